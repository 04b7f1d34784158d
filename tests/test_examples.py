"""The examples run, draw their figures and give the published numbers."""

import copy
import importlib
import math
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from cases import one_thread  # noqa: F401  a fixture for every test here

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sweep_example = importlib.import_module("autosgm_sweep")
article_example = importlib.import_module("optimizer_article")
digits_example = importlib.import_module("train_digits")
hook_example = importlib.import_module("backward_hook")
gpt_example = importlib.import_module("train_gpt")
gsnr_example = importlib.import_module("plot_gsnr")

ITERATIONS = 3000  # the regression stops moving, at 2e-14 from the optimum, before 2500


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def article(tmp_path_factory):
    figure = tmp_path_factory.mktemp("article") / "figures" / "article.png"
    arguments = ["--regression-iterations", str(ITERATIONS), "--figure", str(figure)]
    measured = article_example.main(arguments)
    assert is_png(figure)
    return measured


def test_the_minimum_is_a_root_of_the_derivative():
    # f' has slope 1.17 there and its terms are below 1: a few roundings of 2^-53 each.
    slope = torch.cos(x := torch.tensor(article_example.MINIMUM, dtype=torch.float64)) + x / 5
    assert abs(slope.item()) < 4 * 2**-53


@pytest.mark.parametrize(
    ("run", "step"),
    [
        ("momentum from 8", 216),
        ("momentum from -8", 255),  # published 222, which is not this rule
        ("NAG from -8", 34),
        ("NAG from 8", 27),
        ("NAG torch form from 8", 27),
        ("torch.optim.SGD from 8", 27),
        ("NAG iterate from -8", 32),
        ("NAG iterate from 8", 24),
    ],
)
def test_step_of_convergence(article, run, step):
    assert article.traces[run].step == step


def test_sgd_visits_the_published_points(article):
    trace = article.traces["SGD from -8"]
    published = [float(x) for x in article_example.SGD.split()] + [-1.3067, -1.3064]
    assert trace.updates == 16
    assert [round(x, 4) for x in trace.points[: len(published)]] == published


def test_sgd_from_8_stays_in_the_local_minimum(article):
    trace = article.traces["SGD from 8"]
    assert trace.step is None
    assert len(trace.points) == 21
    x = torch.tensor(trace.points[-1], dtype=torch.float64)
    assert round(x.item(), 5) == 3.83747
    assert round(article_example.f(x).item(), 5) == 0.83156


def test_the_rules_differ_where_the_article_says_so(article):
    """Dropping the momentum or its look-ahead is visible in the numbers above."""
    plain = article_example.descend(article_example.fm.FusedSGD, -8, lr=1.0, momentum=0.0)
    heavy = article_example.descend(article_example.fm.FusedMomentum, -8, lr=1.0, momentum=0.9)
    nag = article.traces["NAG from -8"]
    assert len({plain.step, heavy.step, nag.step}) == 3


def test_newton_visits_the_published_points(article):
    published = [float(x) for x in article_example.NEWTON.split()]
    # One unit of the last published digit: the tenth is -1.306440138, published as ...13.
    assert article.newton == pytest.approx(published, rel=0, abs=1e-8)


def test_regression_follows_the_published_losses(article):
    losses = article.regression.losses
    published = dict(article_example.LOSSES)
    assert losses[400] == pytest.approx(published.pop(400), rel=0, abs=1e-4)  # its last digit
    assert {i: round(losses[i], 4) for i in published} == published
    assert [round(g, 4) for g in article.regression.first_gradients] == [-2.2857, 2.6574]


def test_regression_ends_at_least_squares(article):
    fit = article.regression
    # The 100x2 matrix has condition number 3.6: a solver is a few times 3.6 * 2^-53 * |x| off.
    published = (2.968467510701021, 4.222151077447227)
    assert fit.least_squares == pytest.approx(published, rel=0, abs=1e-14)
    assert fit.line == pytest.approx(fit.least_squares, rel=0, abs=1e-13)  # as published


def test_training_takes_three_values_per_parameter(article):
    assert article.bytes_per_parameter == 3 * 2


def max_difference(a, b):
    return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))


def torch_run(model, **options):
    model = copy.deepcopy(model)
    options = digits_example.OPTIMIZER_ARGS | options
    optimizer = torch.optim.SGD(model.parameters(), foreach=False, **options)
    return digits_example.Run(model, optimizer)


@pytest.fixture(scope="module")
def rounding_bound():
    """(largest loss difference that rounding explains over one epoch, losses without decay differ).

    Ours and torch's for-loop round a step differently by at most one ulp of each parameter in each
    of its two writes, buffer and parameter. What one ulp in all parameters does to the losses is
    measured with torch alone; to first order T steps add up to at most 2 T times that.
    """
    torch.manual_seed(0)
    model = digits_example.alexnet_for_digits()
    nudged = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in nudged.parameters():
            parameter.copy_(torch.nextafter(parameter, 2 * parameter))
    exact, moved, undecayed = torch_run(model), torch_run(nudged), torch_run(model, weight_decay=0)
    digits_example.train([exact, moved, undecayed], epochs=1)
    bound = 2 * len(exact.losses) * max_difference(exact, moved)
    return bound, max_difference(exact, undecayed)


def test_digits_losses_equal_torch(rounding_bound, tmp_path):
    figure = tmp_path / "figures" / "digits.png"
    results = digits_example.main(["--epochs", "1", "--figure", str(figure)])
    assert is_png(figure)
    bound, without_decay = rounding_bound
    assert results.max_loss_difference <= bound < without_decay
    assert len(results.ours.losses) == len(results.ours.step_seconds) == 44
    assert results.ours.losses[-1] < 0.7 * results.ours.losses[0]
    assert results.ours.accuracy > 0.5  # chance is 0.1


def test_digits_takes_optimizer_arguments(tmp_path):
    arguments = ["--epochs", "1", "--figure", str(tmp_path / "digits.png")]
    results = digits_example.main([*arguments, "--optimizer-args", "lr=0.02", "nesterov=True"])
    for run in (results.ours, results.theirs):
        group = run.optimizer.param_groups[0]
        assert (group["lr"], group["nesterov"], group["momentum"]) == (0.02, True, 0.9)


def test_autosgm_is_trained_in_every_setting(tmp_path):
    figure = tmp_path / "figures" / "sweep.png"
    panels = sweep_example.main(["--epochs", "1", "--figure", str(figure)])
    assert is_png(figure)
    runs = {name: run for rows in panels.values() for name, run in rows.items()}
    assert len(runs) == 11
    assert len({run.losses[0] for run in runs.values()}) == 1, "other weights, or another batch"
    # Numerator "unity" is the heavy ball of the other panel.
    assert len({run.losses[-1] for run in runs.values()}) == len(runs) - 1, "a setting twice"
    assert {len(run.losses) for run in runs.values()} == {sweep_example.STEPS_PER_EPOCH}
    assert runs["RMSProp-like"].losses[-1] < 0.8 * runs["RMSProp-like"].losses[0]


def test_layer_by_layer_equals_the_ordinary_step():
    results = hook_example.main(steps=5)
    assert results.equal == {"backward hook": True, "flat slices": True}
    assert results.pointers_kept == {"backward hook": True, "flat slices": True}
    assert results.gradients_alive == 1


def test_same_parameters_sees_one_ulp():
    a, b = hook_example.network(), hook_example.network()
    assert hook_example.same_parameters(a, b)
    with torch.no_grad():
        b[0].bias[0] = torch.nextafter(b[0].bias[0], torch.tensor(1.0))
    assert not hook_example.same_parameters(a, b)


def test_gpt_is_trained_by_all_three(tmp_path):
    figure, steps = tmp_path / "figures" / "gpt.png", 20
    runs = gpt_example.main(["--steps", str(steps), "--device", "cpu", "--figure", str(figure)])
    assert is_png(figure)
    assert list(runs) == ["FusedSGDSaI", "FusedSGD", "AdamW"]
    assert len({run.losses[0] for run in runs.values()}) == 1, "other weights, or another batch"
    for run in runs.values():
        assert len(run.losses) == len(run.step_seconds) == steps
        assert run.losses[0] == pytest.approx(math.log(128), rel=0.05)  # it knows nothing yet
        assert 2 < run.validation < run.losses[-1] + 0.5 < run.losses[0]
    ours, plain, adamw = (run.state_bytes / run.parameters for run in runs.values())
    assert plain == 4
    assert 4 < ours < 4.01  # and two numbers per tensor
    assert 8 < adamw < 8.01


@pytest.mark.parametrize(
    ("size", "billions"), [("gpt2", 0.124), ("gpt2-xl", 1.56), ("llama-7b", 6.57)]
)
def test_the_large_gpts_are_as_large_as_they_say(size, billions):
    with torch.device("meta"):
        model = gpt_example.GPT(gpt_example.SIZES[size])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)


def test_the_scales_of_a_gpt_are_the_roots_of_its_sizes(tmp_path):
    figure = tmp_path / "figures" / "gsnr.png"
    scales = gsnr_example.main(["--figure", str(figure)])
    assert is_png(figure)
    assert len(scales) == 52
    # The bound, sqrt(n - 1), from below; from above, matrices have next to no common sign.
    for name, scale in scales.items():
        above = 1.001 if scale.numel > 1000 else 1.2
        assert math.sqrt(1 - 1 / scale.numel) * 0.999 < scale.ratio < above, name

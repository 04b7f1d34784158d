"""FusedAutoSGM's settings, readable and as tuples; what is wrong with them; checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from cases import (
    VARIANTS,
    Variant,
    backends,
    bits,
    device_of,
    one_thread,  # noqa: F401  a fixture for every test here
    values,
)
from torch.nn import Parameter

from fused_momentum import FusedAutoSGM, LearningRate, Smoothing, WeightDecay, Window
from fused_momentum.optimizers.autosgm_config import NUMERATORS

CONFIGURATIONS: dict[str, Variant] = {k: v for k, v in VARIANTS.items() if v.name == "autosgm"}
SHAPES = [(), (3,), (40, 30)]

# --- readable names ------------------------------------------------------------------------------

READABLE = {
    "lr_cfg": ("learning_rate", LearningRate(0.1, False, "moment"), (False, 0.1, 3)),
    "beta_cfg": (
        "smoothing",
        Smoothing(0.5, 0.25, 1, False, moment_pole=0.75, numerator_pole=0.875),
        (0.875, 0.75, 0.5, 0.25, 1.0, False),
    ),
    "rc_cfg": (
        "window",
        Window("polynomial", 0.1, 3, False, 4, 5, "steps", 3, 0.2, "kronecker"),
        (2, 1, 0.1, 3.0, 0, 4, 5, 3, 0.2),
    ),
    "wd_cfg": ("decay", WeightDecay(0.1, True), (0.1, 1)),
    "eps_cfg": ("eps", 0.5, (0.5,)),
}
readable = pytest.mark.parametrize(("key", "row"), READABLE.items(), ids=READABLE)


@readable
def test_readable_names_are_the_published_tuples(key, row):
    name, value, published = row
    given = FusedAutoSGM([Parameter(torch.ones(2))], **{name: value})
    same = FusedAutoSGM([Parameter(torch.ones(2))], **{key: published})
    mine, theirs = ({**o.param_groups[0], "params": None} for o in (given, same))
    assert mine == theirs
    assert mine[key] == published
    assert mine["lr"] == (0.1 if key == "lr_cfg" else 0.01)
    given.add_param_group({"params": [Parameter(torch.ones(2))], name: value})
    assert given.param_groups[1].keys() == given.param_groups[0].keys()
    assert given.param_groups[1][key] == published


@readable
def test_a_tuple_beside_a_readable_name_that_says_something_else_is_an_error(key, row):
    name, value, published = row
    p, other = (Parameter(torch.ones(2)) for _ in range(2))
    optimizer = FusedAutoSGM([p], **{key: published, name: value})  # the same, twice
    wrong = {key: (0.25, *published[1:]), name: value}
    with pytest.raises(ValueError, match=f"{name} is .*{key}=.* is given too; needed: one of the"):
        FusedAutoSGM([p], **wrong)
    with pytest.raises(ValueError, match=f"{name} is .*{key}=.* is given too; needed: one of the"):
        optimizer.add_param_group({"params": [other], **wrong})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("config", [LearningRate, Smoothing, WeightDecay])
def test_settings_print_themselves_and_return_from_tuples(config):
    settings = {LearningRate: (0.1, True, 2), Smoothing: (0.5, 0.25), WeightDecay: (0.1, True)}
    given = config(*settings[config])
    assert eval(repr(given), {config.__name__: config}) == given
    assert config.of(given.published()) == given


def test_numerators_have_names():
    for k, name in enumerate(NUMERATORS):
        assert LearningRate(numerator=name).published()[2] == k


def test_the_learning_rate_of_a_group():
    params = [Parameter(torch.ones(2)) for _ in range(4)]
    groups = [
        {"params": params[0]},
        {"params": params[1], "lr": 0.25},
        {"params": params[2], "lr_cfg": (True, 0.5, 0)},
        {"params": params[3], "learning_rate": LearningRate(0.75)},
    ]
    optimizer = FusedAutoSGM(groups, lr_cfg=(True, 0.125, 3))
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.25, 0.5, 0.75]
    assert FusedAutoSGM([params[0]], lr=0.3, lr_cfg=(True, 0.5, 0)).param_groups[0]["lr"] == 0.3


# --- what is wrong -------------------------------------------------------------------------------

NAN = float("nan")
BAD = {
    "lr_length": ({"lr_cfg": (True, 0.1)}, ValueError, r"lr_cfg has 2 entries.*aoptlr, lr_init"),
    "lr_type": ({"lr_cfg": 0.1}, TypeError, r"lr_cfg is 0\.1; needed: a tuple \(aoptlr"),
    "rate_type": ({"lr_cfg": (True, "a", 0)}, TypeError, r"rate \(lr_cfg\[1\]\) is 'a'"),
    "rate": ({"lr_cfg": (True, -0.1, 0)}, ValueError, r"rate \(lr_cfg\[1\]\) is -0\.1.*0 or more"),
    "normalized": ({"lr_cfg": (4, 0.1, 0)}, TypeError, r"normalized \(lr_cfg\[0\]\) is 4; needed"),
    "numerator": ({"lr_cfg": (True, 0.1, 5)}, ValueError, r"numerator \(lr_cfg\[2\]\) is 5"),
    "numerator_type": ({"lr_cfg": (True, 0.1, 1.5)}, TypeError, r"lr_cfg\[2\]\) is 1\.5"),
    "beta_length": ({"beta_cfg": (0.9,) * 5}, ValueError, "beta_cfg has 5 entries.*beta_n, beta_a"),
    "beta_n": ({"beta_cfg": (1, 0.9, 0.9, 0, 0, True)}, ValueError, r"beta_cfg\[0\]\) is 1;"),
    "beta_a": ({"beta_cfg": (0.9, NAN, 0.9, 0, 0, True)}, ValueError, r"beta_cfg\[1\]\) is nan"),
    "beta_i": ({"beta_cfg": (0.9, 0.9, -1, 0, 0, True)}, ValueError, r"beta_cfg\[2\]\) is -1"),
    "gamma": ({"beta_cfg": (0.9, 0.9, 0.5, 0.75, 0, True)}, ValueError, r"zero \(beta_cfg\[3\]\)"),
    "eta": ({"beta_cfg": (0.9, 0.9, 0.9, 0, -1, True)}, ValueError, r"beta_cfg\[4\]\) is -1"),
    "debias": ({"beta_cfg": (0.9, 0.9, 0.9, 0, 0, 2)}, TypeError, r"debias \(beta_cfg\[5\]\) is 2"),
    "rc_length": ({"rc_cfg": (1, 0)}, ValueError, "rc_cfg has 2 entries.*rcm, inseq, x"),
    "rcm": ({"rc_cfg": (7, 0, 0, 2, 1, 9, 1, 1, 0)}, ValueError, r"rc_cfg\[0\], rcm\) is 7"),
    "x": ({"rc_cfg": (1, 0, 2, 2, 1, 9, 1, 1, 0)}, ValueError, r"minimum \(rc_cfg\[2\], x\) is 2"),
    "tau": ({"rc_cfg": (1, 0, 0, 2, 1, 0.5, 1, 1, 0)}, TypeError, r"rc_cfg\[5\], tau\) is 0\.5"),
    "wd_length": ({"wd_cfg": (0.1,)}, ValueError, r"wd_cfg has 1 entries.*wd_cte, wd_lvl"),
    "wd": ({"wd_cfg": (-1, 0)}, ValueError, r"rate \(wd_cfg\[0\]\) is -1"),
    "wd_lvl": ({"wd_cfg": (0.1, 2)}, TypeError, r"decoupled \(wd_cfg\[1\]\) is 2; needed: 0 or 1"),
    "eps_length": ({"eps_cfg": ()}, ValueError, r"eps_cfg has 0 entries, \(\); needed: a tuple"),
    "eps_tuple": ({"eps_cfg": 1e-8}, TypeError, r"eps_cfg is 1e-08; needed: a tuple"),
    "eps_type": ({"eps_cfg": (True,)}, TypeError, r"eps_cfg\[0\], eps, is True"),
    "eps": ({"eps_cfg": (-1e-8,)}, ValueError, r"eps_cfg\[0\], eps, is -1e-08.*0 or more"),
    "compat": ({"compat": "v2"}, ValueError, r"compat='v2' is not one of \['fixed', 'v1'\]"),
}  # fmt: skip
bad = pytest.mark.parametrize(("given", "kind", "message"), BAD.values(), ids=BAD)


@bad
def test_bad_settings(given, kind, message):
    with pytest.raises(kind, match=message):
        FusedAutoSGM([Parameter(torch.ones(2))], **given)
    optimizer = FusedAutoSGM([Parameter(torch.ones(2))])
    with pytest.raises(kind, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], **given})
    assert len(optimizer.param_groups) == 1


@bad
@backends
@pytest.mark.parametrize("steps", [0, 2])
def test_bad_settings_that_are_written_into_a_group(given, kind, message, steps, backend):
    params = [Parameter(torch.ones(2, device=device_of(backend))) for _ in range(2)]
    optimizer = FusedAutoSGM([{"params": [p]} for p in params], backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(steps):
        optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    optimizer.param_groups[1].update(given)
    with pytest.raises(kind, match=message):
        optimizer.step()
    after = (params, optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", [row[0] for row in READABLE.values()])
def test_readable_names_take_their_own_kind(name):
    with pytest.raises(TypeError, match=rf"{name} is 'cosine'; needed: a \w+, for \w+_cfg"):
        FusedAutoSGM([Parameter(torch.ones(2))], **{name: "cosine"})


# --- checkpoints ---------------------------------------------------------------------------------


def train(optimizer, steps):
    for step in steps:
        for i, p in enumerate(q for group in optimizer.param_groups for q in group["params"]):
            # The second parameter's first gradient comes late.
            given = values(p.shape, torch.float32, 10 * step + i).to(p)
            p.grad = None if i == 1 and step < 2 else given
        optimizer.step()
    return optimizer


def through_file(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = [Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    other = FusedAutoSGM(params, backend=optimizer._options.backend)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", [through_file, pickled, copy.deepcopy])
@pytest.mark.parametrize("variant", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_resuming_equals_never_having_stopped(variant, route, dtype, backend):
    params = [
        Parameter(values(s, torch.float32, i).to(device_of(backend), dtype, copy=True))
        for i, s in enumerate(SHAPES)
    ]
    optimizer = train(FusedAutoSGM(params, backend=backend, **variant.hyper), range(3))
    other = route(optimizer)
    for run in (optimizer, other):
        train(run, range(3, 7))
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        assert p is not q
        assert torch.equal(bits(p), bits(q))
        mine, theirs = optimizer.state[p], other.state[q]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(bits(mine[key]), bits(theirs[key])) for key in mine)
        assert all(mine[key].dtype == theirs[key].dtype for key in mine)
    assert [optimizer.state[p]["step"].item() for p in params] == [7, 5, 7]

"""FusedSGDSaI: scales and updates against float64 and exact arithmetic, in every mode."""

import itertools
import math
from fractions import Fraction

import pytest
import sai_model
import torch
from cases import (
    backends,
    device_of,
    one_thread,  # noqa: F401  a fixture for every test here
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sai_model import DEGENERATE, SCALES
from torch.nn import Parameter

from fused_momentum import FusedSGDSaI

modes = pytest.mark.parametrize(
    ("scale", "degenerate"), list(itertools.product(SCALES, DEGENERATE))
)
NAN, INF = math.nan, math.inf
FLOAT32 = 2.0**-23  # a scale is kept in float32: one rounding, and one of the comparison's own


def stepped(grads, backend="reference", params=None, **kwargs):
    """An optimizer of new parameters after one step on each row of gradients, and those."""
    rows = [grads] if isinstance(grads, torch.Tensor) else grads
    params = params or [Parameter(torch.zeros_like(g, device=device_of(backend))) for g in rows]
    optimizer = FusedSGDSaI(params, backend=backend, **kwargs)
    give(params, rows)
    optimizer.step()
    return optimizer, params


def give(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.to(p.device)


def scale_of(grad, backend="reference", **kwargs):
    """The scale that a first gradient gives."""
    optimizer, (p,) = stepped(grad, backend, **kwargs)
    return optimizer.state[p]["gsnr"].item()


def numbers(optimizer, p):
    return {key: t.item() for key, t in optimizer.state[p].items() if key != "momentum_buffer"}


# --- the scale -------------------------------------------------------------------------------


def exact_scale(grad):
    """|g| / std(g) of a list, its sums exact."""
    grad = [Fraction(x) for x in grad]
    n, total, squares = len(grad), sum(grad), sum(x * x for x in grad)
    variance = (squares - total * total / n) / (n - 1)
    return math.sqrt(squares / variance) if variance else INF


MEANS = [
    (mean, dtype) for mean in (0, 1, 10, 100, 1e3, 1e4) for dtype in (torch.float32, torch.float64)
]
MEANS += [(1, torch.bfloat16), (1, torch.float16)]


@backends
@pytest.mark.parametrize(("mean", "dtype"), MEANS, ids=str)
def test_the_scale_is_exact_far_from_zero(mean, dtype, backend):
    """A mean of 1e4 deviations: float32 sums would be off by three quarters."""
    grad = (values((4099,), torch.float64, 1) + mean).to(dtype)
    exact = exact_scale(grad.tolist())
    assert exact > 0.9 * math.sqrt(4098 * (1 + mean**2))
    assert scale_of(grad, backend, eps=0.0) == pytest.approx(exact, rel=FLOAT32)


@backends
@pytest.mark.parametrize("magnitude", [1e-38, 1e-15, 1.0, 1e15, 1e38])
def test_squares_neither_overflow_nor_vanish(magnitude, backend):
    grad = values((257,), torch.float64, 1) * magnitude / 4
    expected = exact_scale(grad.float().tolist())
    assert scale_of(grad.float(), backend, eps=0.0) == pytest.approx(expected, rel=FLOAT32)


entries = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@settings(deadline=None, max_examples=200)
@given(st.lists(entries, min_size=2, max_size=40), st.randoms(use_true_random=False))
def test_bounds_and_invariances_of_the_scale(grad, random):
    n, exact = len(grad), exact_scale(grad) if any(grad) else 0.0
    scale = scale_of(torch.tensor(grad), eps=0.0)
    if not any(grad):
        assert scale == 0.0
        return
    assert scale >= math.sqrt(n - 1) * (1 - FLOAT32)
    # Nearer to constant than 2^-40 = 1 - c, and the float64 sums say nothing; twice that is clear.
    if exact < math.sqrt((n - 1) * 2.0**39):
        # An error of 2^-53 per operation of the sums, over 1 - c; half of it in the root.
        cancelled = 2.0**-53 * (n + 4) * exact**2 / (n - 1)
        assert scale == pytest.approx(exact, rel=FLOAT32 + cancelled)
        assert scale_of(torch.tensor(grad) * 0.25, eps=0.0) == scale
        shuffled = random.sample(grad, n)
        again = scale_of(torch.tensor(shuffled), eps=0.0)
        assert again == pytest.approx(scale, rel=FLOAT32 + cancelled)
    elif exact == INF:
        assert scale == pytest.approx(math.sqrt(n - 1), rel=FLOAT32)


def test_eps_is_added_to_the_deviation_and_read_when_the_tensor_is_measured():
    grad = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0]) * 2.0**-20  # norm 4, deviation 2
    assert scale_of(grad, eps=0.0) == 2.0
    assert scale_of(grad, eps=2.0**-19) == 1.0
    optimizer, (p,) = stepped(torch.zeros(5), eps=0.0)
    optimizer.param_groups[0]["eps"] = 2.0**-19
    p.grad = grad
    optimizer.step()
    assert optimizer.state[p]["gsnr"] == 1.0
    optimizer.param_groups[0]["eps"] = 0.0
    optimizer.step()
    assert optimizer.state[p]["gsnr"] == 1.0


# First gradient -> scale as released, bound, and with "defer"; the stage after it.
ROUNDED = torch.full((101,), 0.1)  # the sums' rounding gives it a variance above 0
FIRST = {
    "zero": (torch.zeros(5), 0.0, 0.0, 0.0, (3, 0, 0)),
    "zero_element": (torch.zeros(()), 0.0, 0.0, 0.0, (3, 0, 0)),
    "one_element": (torch.tensor([0.5]), 0.5 / 2.0**-20, 1.0, 1.0, (3, 3, 3)),
    "one_negative": (torch.tensor(-0.5), 0.5 / 2.0**-20, 1.0, 1.0, (3, 3, 3)),
    "constant": (torch.full((4, 4), 0.5), 2.0 / 2.0**-20, 15**0.5, 15**0.5, (3, 3, 2)),
    "constant_rounded": (ROUNDED, None, 10.0, 10.0, (3, 3, 2)),
    "nan": (torch.tensor([1.0, NAN, 2.0]), NAN, 2**0.5, 2**0.5, (3, 3, 2)),
    "inf": (torch.tensor([1.0, INF, 2.0]), INF, 2**0.5, 2**0.5, (3, 3, 2)),
    "both_inf": (torch.tensor([-INF, INF, 2.0]), INF, 2**0.5, 2**0.5, (3, 3, 2)),
    "ordinary": (
        torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0]),
        *[4.0 / (2.0 + 2.0**-20)] * 3,
        (3, 3, 3),
    ),
    "none": (torch.zeros(0), 0.0, 0.0, 0.0, None),
}


@backends
@pytest.mark.parametrize("degenerate", DEGENERATE)
@pytest.mark.parametrize("row", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_degenerate_first_gradients(row, degenerate, dtype, backend):
    grad, official, bound, defer, stages = row
    expected = {"official": official, "bound": bound, "defer": defer}[degenerate]
    optimizer, (p,) = stepped(grad.to(dtype), backend, eps=2.0**-20, degenerate=degenerate)
    state = optimizer.state[p]
    assert (state["gsnr"].dtype, state["gsnr"].shape) == (torch.float32, ())
    if expected is not None:
        assert state["gsnr"].item() == pytest.approx(expected, rel=FLOAT32, nan_ok=True)
    else:  # the deviation is the rounding of the entries; released: 3.5e7 or 6.1e7 with eps 1e-8
        assert state["gsnr"] > 1e4
    if stages:
        assert state["stage"] == stages[("official", "bound", "defer").index(degenerate)]


# --- the updates -----------------------------------------------------------------------------

SHAPES = [(), (1,), (0,), (7,), (3, 5, 2), (1030,), (64,), (64,), (64,), (64,)]
T = 7
# Per step, for the last four: a gradient that comes late, is zero, is constant, is lost at times.
KINDS = {
    6: ["late", "late", "random", "random", "zero", "random", "random"],
    7: ["zero", "zero", "random", "zero", "random", "random", "random"],
    8: ["zero", "constant", "constant", "random", "constant", "random", "random"],
    9: ["random", "late", "zero", "late", "random", "late", "constant"],
}
SETTINGS = [
    {"lr": lr, "momentum": mu, "weight_decay": wd, "eps": 1e-3}
    for lr, mu, wd in [(0.1, 0.9, 0.05), (0.1, 0.9, 0.0), (0.02, 0.7, 0.3)]
]


def gradient(i, step, dtype):
    kind = KINDS.get(i, ["random"] * T)[step]
    if kind == "late":
        return None
    grad = values(SHAPES[i], torch.float64, 100 * (step + 1) + i).to(dtype)
    return grad * 0 if kind == "zero" else grad * 0 + 0.25 if kind == "constant" else grad


def trained(scale, degenerate, dtype, backend):
    """Pairs of a parameter and its model after T steps, and the largest value on the way."""
    starts = [values(shape, torch.float64, i).to(dtype) for i, shape in enumerate(SHAPES)]
    params = [Parameter(p.to(device_of(backend), copy=True)) for p in starts]
    models = [sai_model.Tensor(p, scale, degenerate) for p in starts]
    optimizer = FusedSGDSaI(params, scale=scale, degenerate=degenerate, backend=backend)
    largest = 0.0
    for step in range(T):
        grads = [gradient(i, step, dtype) for i in range(len(SHAPES))]
        now = SETTINGS[step % len(SETTINGS)]
        optimizer.param_groups[0].update(now)
        give(params, grads)
        optimizer.step()
        sai_model.step(models, grads, **now)
        for p, model in zip(params, models, strict=True):
            kept = optimizer.state.get(p, {}).get("gsnr", 0.0)
            assert float(kept) == pytest.approx(model.gsnr, rel=FLOAT32)
        moved = [now["lr"] * m.gsnr * m.m.abs().max() for m in models if m.m.numel()]
        largest = max([largest, *moved, *(m.p.abs().max() for m in models if m.p.numel())])
    return list(zip(params, models, strict=True)), float(largest)


@modes
@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_formula(scale, degenerate, backend, dtype):
    """Gradients are given, so an error of p is not fed back.

    A step rounds at most 12 times, m and p and the scalars, each time by half an ulp of a value of
    at most ``largest``; what m has gathered goes into p at every later step: T times at most. The
    scale, which both keep in float32, is the same but where its last bit is in doubt.
    """
    pairs, largest = trained(scale, degenerate, dtype, backend)
    limit = T * T * 12 * torch.finfo(dtype).eps / 2 * largest
    for i, (p, model) in enumerate(pairs):
        if p.numel():
            assert (p.detach().cpu().double() - model.p).abs().max() <= limit, f"tensor {i}"
            assert not torch.equal(model.p, values(SHAPES[i], torch.float64, i).to(dtype).double())


def test_the_model_tells_the_modes_apart():
    ends = {
        mode: torch.cat([m.p.flatten() for _, m in trained(*mode, torch.float64, "reference")[0]])
        for mode in itertools.product(SCALES, DEGENERATE)
    }
    for one, other in itertools.combinations(ends, 2):
        # The root of the size asks nothing but whether there is a gradient.
        same = one[0] == other[0] == "sqrt_numel" and "official" not in (one[1], other[1])
        assert torch.equal(ends[one], ends[other]) == same, (one, other)


@backends
def test_the_largest_scale_is_that_of_all_groups_and_grows(backend):
    big, small, other = (values((n,), torch.float32, n) for n in (4097, 65, 16385))
    params = [
        Parameter(torch.zeros_like(g, device=device_of(backend))) for g in (big, small, other)
    ]
    groups = [{"params": params[:1]}, {"params": params[1:2], "lr": 0.5}]
    groups.append({"params": params[2:], "scale": "gsnr"})
    optimizer = FusedSGDSaI(groups, scale="gsnr_max", backend=backend)
    give(params, [None, small, other])
    optimizer.step()
    kept = [optimizer.state[p] for p in params]
    assert kept[1]["gsnr_max"] == kept[1]["gsnr"]
    assert "gsnr_max" not in kept[2]
    give(params, [big, small, other])
    optimizer.step()
    kept = [optimizer.state[p] for p in params]
    assert kept[0]["gsnr"] > kept[1]["gsnr"]
    assert kept[0]["gsnr_max"] == kept[1]["gsnr_max"] == kept[0]["gsnr"]
    assert kept[2]["gsnr"] > kept[0]["gsnr"]  # it does not take part


@backends
def test_a_mode_may_change_while_training(backend):
    """The buffer goes on, and the next step divides, or no longer does."""
    grads = [values((n,), torch.float32, n) for n in (33, 129)]
    optimizer, params = stepped(grads, backend, weight_decay=0.0, lr=0.5)
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    scales = [optimizer.state[p]["gsnr"].item() for p in params]
    for scale, divisor in (("gsnr_max", max(scales)), ("sqrt_numel", 1.0), ("gsnr", 1.0)):
        before = [p.detach().double() for p in params]
        optimizer.param_groups[0]["scale"] = scale
        optimizer.step()  # on the same gradients, so that the average stays
        for p, m, old, g in zip(params, buffers, before, scales, strict=True):
            assert torch.allclose(optimizer.state[p]["momentum_buffer"], m, rtol=1e-6, atol=0)
            expected = old - 0.5 * g / divisor * m.double()
            assert torch.allclose(p.detach().double(), expected, rtol=1e-5, atol=1e-5)


# --- when a tensor is measured ---------------------------------------------------------------


def measuring_steps(optimizer, params, rows):
    """Which of the steps, one per row of gradients, ran the measuring pass."""
    optimizer.step()  # the plan is made
    (runner,) = optimizer._plan._runners.values()
    measure, found = runner.measure, []
    for i, grads in enumerate(rows):
        runner.measure = lambda *args, i=i: (found.append(i), measure(*args))
        give(params, grads)
        optimizer.step()
    return found


@backends
@pytest.mark.parametrize("degenerate", ["bound", "defer"])
def test_a_steady_step_measures_nothing(degenerate, backend):
    ordinary, zero, one = values((64,), torch.float32, 1), torch.zeros(64), torch.ones(64)
    params = [Parameter(torch.zeros(64, device=device_of(backend))) for _ in range(2)]
    optimizer = FusedSGDSaI(params, degenerate=degenerate, backend=backend)
    rows = [(ordinary, zero), (ordinary, zero), (ordinary, one), (ordinary, one), (one, ordinary)]
    rows += [(ordinary, ordinary)] * 3
    steps = {"bound": [0, 1, 2], "defer": [0, 1, 2, 3, 4]}[degenerate]
    assert measuring_steps(optimizer, params, rows) == steps


@backends
@pytest.mark.parametrize("degenerate", DEGENERATE)
def test_a_parameter_without_elements_is_never_measured(degenerate, backend):
    params = [Parameter(torch.zeros(n, device=device_of(backend))) for n in (64, 0)]
    optimizer = FusedSGDSaI(params, degenerate=degenerate, backend=backend)
    rows = [(values((64,), torch.float32, 1), torch.zeros(0))] * 3
    assert measuring_steps(optimizer, params, rows) == [0]


@backends
def test_initialise_measures_and_changes_no_parameter(backend):
    first, second = values((64,), torch.float32, 1), values((64,), torch.float32, 2) + 1
    p, late = (Parameter(torch.ones(64, device=device_of(backend))) for _ in range(2))
    optimizer = FusedSGDSaI([p, late], backend=backend, weight_decay=0.0)
    give([p], [first])
    optimizer.initialise()
    assert numbers(optimizer, p) == {"gsnr": scale_of(first), "stage": 1.0}
    assert numbers(optimizer, late) == {"gsnr": 0.0, "stage": 0.0}
    assert torch.equal(p.detach().cpu(), torch.ones(64))
    assert not optimizer.state[p]["momentum_buffer"].any()
    tensors = [t.data_ptr() for state in optimizer.state.values() for t in state.values()]
    give([p, late], [second, second])
    optimizer.initialise()  # keeps what is known
    optimizer.step()
    assert tensors == [t.data_ptr() for state in optimizer.state.values() for t in state.values()]
    assert numbers(optimizer, p) == {"gsnr": scale_of(first), "stage": 3.0}
    assert numbers(optimizer, late) == {"gsnr": scale_of(second), "stage": 3.0}
    assert torch.equal(optimizer.state[p]["momentum_buffer"].cpu(), second)


@backends
def test_initialise_before_there_are_gradients_changes_no_bit(backend):
    grads = [values((64,), torch.float32, k) for k in range(3)]
    ends = []
    for early in (False, True):
        p = Parameter(torch.ones(64, device=device_of(backend)))
        frozen = torch.ones(5, device=device_of(backend))
        optimizer = FusedSGDSaI([p, frozen], backend=backend)
        if early:
            optimizer.initialise()
            assert set(optimizer.state) == {p}
        for grad in grads:
            give([p], [grad])
            optimizer.step()
        ends.append([p, *optimizer.state[p].values()])
    assert all(map(torch.equal, *ends))


def test_initialise_may_be_skipped_by_zero_and_unusable_gradients():
    zero, constant = (Parameter(torch.ones(5)) for _ in range(2))
    optimizer = FusedSGDSaI([zero, constant], degenerate="defer")
    give([zero, constant], [torch.zeros(5), torch.ones(5)])
    optimizer.initialise()
    assert [numbers(optimizer, p)["stage"] for p in (zero, constant)] == [0.0, 0.0]


@backends
@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_a_probe_with_zero_gradients_changes_nothing(lr, backend):
    """As torch.distributed.checkpoint does to make the state: zero gradients, a step with lr 0."""
    grads = [values((64,), torch.float32, k) for k in range(3)]
    ends = []
    for probed in (False, True):
        p = Parameter(torch.ones(64, device=device_of(backend)))
        optimizer = FusedSGDSaI([p], lr=0.1, weight_decay=0.0 if lr else 0.05, backend=backend)
        if probed:
            optimizer.param_groups[0]["lr"] = lr
            p.grad = torch.zeros_like(p)
            optimizer.step()
            assert optimizer.state[p].keys() == {"momentum_buffer", "gsnr", "stage"}
            optimizer.param_groups[0]["lr"] = 0.1
        for grad in grads:
            give([p], [grad])
            optimizer.step()
        ends.append([p, *optimizer.state[p].values()])
    assert all(map(torch.equal, *ends))


def test_zero_gradients_decay_and_wait():
    optimizer, (p,) = stepped(torch.zeros(8), params=[Parameter(torch.ones(8))], lr=0.5)
    assert torch.equal(p.detach(), torch.full((8,), 1 - 0.5 * 1e-2))
    assert numbers(optimizer, p) == {"gsnr": 0.0, "stage": 0.0}

"""What only a GPU can show of FusedSGDSaI; run by `make gpu`.

Its numbers there are test_sgd_sai.py's, whose back-ends are those that the machine has.
"""

import contextlib
import gc

import pytest
import torch
from test_gpu import KINDS, copies, params_of
from torch.nn import Parameter

import fused_momentum as fm

pytestmark = pytest.mark.gpu
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
MODES = pytest.mark.parametrize(
    "modes",
    [{}, {"scale": "gsnr_max", "degenerate": "defer"}, {"degenerate": "official"}],
    ids=["gsnr", "gsnr_max-defer", "official"],
)


def made(params, backend, **more):
    return fm.FusedSGDSaI(params, backend=backend, **(SETTINGS | more))


@contextlib.contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of(step):
    """Names of our kernels that a step runs, and of torch's."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # conftest's, by kernels of torch's
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if "mem" not in e.name.lower() and e.device_time]
    ours = [name for name in names if "at::" not in name]
    return ours, [name for name in names if "at::" in name]


def same(params, others):
    return all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def same_states(optimizer, params, other, others):
    return all(
        torch.equal(t, other.state[q][key])
        for p, q in zip(params, others, strict=True)
        for key, t in optimizer.state[p].items()
    )


# --- waiting and launching -------------------------------------------------------------------


@KINDS
@MODES
def test_no_step_waits_for_the_device(backend, modes):
    """Neither the first one after initialise(), nor the steady ones, nor those of zeros."""
    params = params_of()
    params[0].grad.zero_()
    optimizer = made(params, backend, **modes)
    optimizer.initialise()
    with no_waiting():
        for _ in range(5):
            optimizer.step()


@MODES
def test_the_first_gradients_may_come_after_initialise(modes):
    params = params_of()
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    optimizer = made(params, "cuda", **modes)
    optimizer.initialise()
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    with no_waiting():
        optimizer.step()


@KINDS
@pytest.mark.parametrize("count", [1, 50, 3000])
def test_launches_do_not_follow_the_number_of_tensors(backend, count):
    params = [Parameter(torch.ones(5, device="cuda")) for _ in range(count)]
    for p in params:
        p.grad = torch.arange(5.0, device="cuda")
    optimizer = made(params, backend)
    optimizer.initialise()
    first, _ = kernels_of(optimizer.step)
    assert 2 <= len(first) <= 3, first  # sums, the scales from them, the update
    for _ in range(2):  # the host learns that all is measured
        torch.cuda.synchronize()
        optimizer.step()
    ours, torchs = kernels_of(optimizer.step)
    assert len(ours) == 1, ours
    assert not torchs, torchs


@KINDS
def test_the_state_is_half_of_adamws(backend):
    n = 10_000_000

    def allocated(make):
        p = Parameter(torch.ones(n, device="cuda"))
        p.grad = torch.arange(float(n), device="cuda")
        before = torch.cuda.memory_allocated()
        optimizer = make([p])
        optimizer.step()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before

    gc.collect()  # or what earlier tests have left is freed on this one's account
    ours = allocated(lambda params: made(params, backend))
    theirs = allocated(lambda params: torch.optim.AdamW(params, fused=True))
    assert ours <= 0.51 * theirs
    assert ours >= 4 * n


# --- capturing -------------------------------------------------------------------------------


def captured(optimizer):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def change_grads(params, step):
    for i, p in enumerate(params):
        maker = torch.Generator().manual_seed(1000 * step + i)
        p.grad.copy_(torch.randn(p.shape, generator=maker))


@KINDS
@MODES
def test_the_first_step_may_be_in_a_graph(backend, modes):
    """Measured by initialise(), the first step and all others replayed."""
    params = params_of()
    eager = copies(params)
    optimizer, other = made(params, backend, **modes), made(eager, backend, **modes)
    for each in (optimizer, other):
        each.initialise()
    before = [p.detach().clone() for p in params]
    graph = captured(optimizer)
    assert same(params, before), "capturing has taken a step"
    for step in range(4):
        change_grads(params, step)
        change_grads(eager, step)
        graph.replay()
        other.step()
        assert same(params, eager)
    assert same_states(optimizer, params, other, eager)
    optimizer.step()  # and eager from there
    other.step()
    assert same(params, eager)


@MODES
def test_the_measuring_may_be_in_a_graph(modes):
    """No gradient before the capture; one tensor gets zeros at first, one only later."""
    params = params_of()
    eager = copies(params)
    optimizer, other = made(params, "cuda", **modes), made(eager, "cuda", **modes)
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    optimizer.initialise()
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    graph = captured(optimizer)
    assert not any(state["gsnr"].any() for state in optimizer.state.values())
    for step in range(5):
        for tensors in (params, eager):
            change_grads(tensors, step)
            if step < 2:
                tensors[3].grad.zero_()
        graph.replay()
        other.step()
        assert same(params, eager)
    assert same_states(optimizer, params, other, eager)


# --- overflows -------------------------------------------------------------------------------


@KINDS
def test_an_overflow_in_the_first_steps_measures_nothing(backend):
    params = params_of()
    plain = copies(params)
    for p in plain:
        p.grad = p.grad * 0.25  # exact: a power of two
    optimizer, unscaled = made(params, backend, fused=True), made(plain, backend)
    for overflow in (1.0, 1.0, 0.0, 1.0, 0.0):
        optimizer.grad_scale = torch.tensor(4.0, device="cuda")
        optimizer.found_inf = torch.tensor(overflow, device="cuda")
        optimizer.step()
        if not overflow:
            unscaled.step()
        assert same(params, plain)
        assert len(optimizer.state) == len(unscaled.state)
    assert same_states(optimizer, params, unscaled, plain)


@KINDS
def test_an_overflow_is_seen_on_the_device(backend):
    """With the state there is no wait: neither pass may write."""
    params = params_of()
    before = [p.detach().clone() for p in params]
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    optimizer = made(params, backend, fused=True)
    optimizer.initialise()
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    optimizer.grad_scale = torch.tensor(4.0, device="cuda")
    optimizer.found_inf = torch.tensor(1.0, device="cuda")
    optimizer.step()
    assert same(params, before)
    assert not any(t.any() for state in optimizer.state.values() for t in state.values())
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    optimizer.step()
    assert not same(params, before)
    assert all(state["stage"] == 3 for state in optimizer.state.values())

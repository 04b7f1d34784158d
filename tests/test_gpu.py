"""What only a GPU can show; run by `make gpu`.

Bit-equality there is test_parity.py's: its back-ends are those that the machine has.
"""

import pytest
import torch
from torch.nn import Parameter

import fused_momentum as fm

pytestmark = pytest.mark.gpu
KINDS = pytest.mark.parametrize("backend", ["cuda", "triton"])
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def params_of(count=50, device="cuda", dtype=torch.float32):
    made = [Parameter(torch.randn(7 * i + 1).to(device, dtype)) for i in range(count)]
    for p in made:
        p.grad = torch.randn(p.shape).to(device, dtype)
    return made


def copies(params, grads=True):
    made = [Parameter(p.detach().clone()) for p in params]
    for p, source in zip(made, params, strict=True):
        p.grad = source.grad.clone() if grads else None
    return made


def settled(params, backend, **more):
    """An optimizer that has taken its first step."""
    optimizer = fm.FusedSGD(params, backend=backend, **(SETTINGS | more))
    optimizer.step()
    torch.cuda.synchronize()
    return optimizer


@KINDS
def test_a_steady_step_never_waits_for_the_device(backend):
    optimizer = settled(params_of(), backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@KINDS
@pytest.mark.parametrize("count", [1, 50, 3000])
def test_a_steady_step_is_one_kernel(backend, count):
    optimizer = settled([Parameter(torch.ones(5, device="cuda")) for _ in range(count)], backend)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if "mem" not in e.name.lower() and e.device_time]
    assert len(kernels) == 1, kernels


@KINDS
def test_a_captured_step_equals_eager_and_follows_lr(backend):
    lr = torch.tensor(0.1, device="cuda")
    params = params_of()
    eager = copies(params)
    optimizer = settled(params, backend, lr=lr, capturable=True)
    other = settled(eager, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for value in (0.1, 0.05, 0.2):
        lr.fill_(value)
        graph.replay()
        other.param_groups[0]["lr"] = lr.item()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, eager, strict=True))


def backward(params, factor):
    """Gradients in new memory, the same in a graph and out of it."""
    for p in params:
        p.grad = None
    torch.stack([(p * p * factor).sum() for p in params]).sum().backward()


@KINDS
@pytest.mark.parametrize("count", [50, 3000])
def test_a_captured_training_step_equals_eager(backend, count):
    """The graph has gradients of its own; steps with other ones come between its replays."""
    factor = torch.tensor(0.5, device="cuda")
    params = [Parameter(torch.randn(1 + i % 7, device="cuda")) for i in range(count)]
    eager = copies(params, grads=False)
    optimizer, other = (fm.FusedSGD(of, backend=backend, **SETTINGS) for of in (params, eager))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            backward(params, factor)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for p in params:
        p.grad = None
    with torch.cuda.graph(graph):
        backward(params, factor)
        optimizer.step()
    own = [p.grad for p in params]
    for _ in range(2):
        backward(eager, factor)
        other.step()
    for value in (0.5, 0.25, 1.0):
        factor.fill_(value)
        for p, grad in zip(params, own, strict=True):
            p.grad = grad
        graph.replay()
        backward(params, factor)
        optimizer.step()
        for _ in range(2):
            backward(eager, factor)
            other.step()
        assert all(torch.equal(p, q) for p, q in zip(params, eager, strict=True))


@KINDS
def test_an_overflow_changes_nothing_also_at_the_first_step(backend):
    params, scale = params_of(), torch.tensor(4.0, device="cuda")
    plain = copies(params)
    for p in plain:
        p.grad = p.grad * 0.25  # exact: a power of two
    optimizer = fm.FusedSGD(params, backend=backend, fused=True, **SETTINGS)
    unscaled = fm.FusedSGD(plain, backend=backend, **SETTINGS)
    for overflow in (1.0, 0.0, 1.0, 0.0):
        optimizer.grad_scale = scale
        optimizer.found_inf = torch.tensor(overflow, device="cuda")
        optimizer.step()
        if not overflow:
            unscaled.step()
        assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
        assert len(optimizer.state) == len(unscaled.state)


@KINDS
def test_steps_on_a_side_stream_follow_it(backend):
    params = params_of()
    expected = copies(params)
    for p in expected:
        p.grad += 1.0
    settled(expected, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    optimizer = fm.FusedSGD(params, backend=backend, **SETTINGS)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # cycles, which a step on another stream would not wait for
        for p in params:
            p.grad += 1.0
        optimizer.step()
    stream.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))


@KINDS
def test_more_than_two_to_the_31_elements(backend):
    n = 2**31 + 1029
    if torch.cuda.mem_get_info()[0] < 4 * n * 2:
        pytest.skip(f"needs {8 * n / 2**30:.0f} GiB of free GPU memory")
    p = Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    fm.FusedSGD([p], lr=0.5, backend=backend).step()
    assert bool((p == -0.5).all())

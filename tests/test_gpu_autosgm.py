"""What only a GPU can show of FusedAutoSGM; run by `make gpu`.

Its distance from torch and from the model there is test_autosgm.py's, whose back-ends are those
that the machine has.
"""

import itertools

import pytest
import torch
from autosgm_cases import DECAYS, GAINS, RATES, WINDOWS, ZEROS, values
from cases import bits
from test_gpu import KINDS
from test_gpu_sgd_sai import kernels_of, no_waiting
from torch.nn import Parameter

from fused_momentum import FusedAutoSGM

pytestmark = pytest.mark.gpu
SHAPES = ((7,), (), (3, 2), (1024,), (40, 30), (10_007,))
rates = pytest.mark.parametrize("rate", RATES)


def settings_of(rate, compat="fixed"):
    """Groups whose other settings take turns."""
    turns = zip(ZEROS.values(), itertools.cycle(GAINS.values()), itertools.cycle(DECAYS.values()))
    for k, (zero, gain, decay) in enumerate(turns):
        yield {
            "lr_cfg": RATES[rate],
            "beta_cfg": (0.7, 0.99, *zero, *gain),
            "rc_cfg": WINDOWS[k % len(WINDOWS)],
            "wd_cfg": decay,
            "eps_cfg": (1e-3,),
            "maximize": k % 2 == 1,
            "compat": compat,
        }


def made(backend, device, settings, dtype=torch.float32):
    """An optimizer with a group for each of the settings, and its parameters."""
    groups = [
        {"params": [Parameter(values(7 * k + i, *shape).to(device, dtype, copy=True))], **given}
        for k, given in enumerate(settings)
        for i, shape in enumerate(SHAPES)
    ]
    return FusedAutoSGM(groups, backend=backend), [group["params"][0] for group in groups]


def set_grads(params, t, late=False):
    """Gradients of step t; with ``late``, a third begins at step 3, another misses step 4."""
    for k, p in enumerate(params):
        absent = late and ((k % 3 == 1 and t < 3) or (k % 3 == 2 and t == 4))
        p.grad = None if absent else values(100 * t + k, *p.shape).to(p)


def assert_same(optimizer, params, other, others):
    """The same bits in parameters, states, numbers and counts."""
    for k, (p, q) in enumerate(zip(params, others, strict=True)):
        assert torch.equal(bits(p), bits(q)), f"parameter {k}"
        mine, true = optimizer.state[p], other.state[q]
        assert mine.keys() == true.keys()
        for key, tensor in mine.items():
            assert torch.equal(bits(tensor), bits(true[key])), f"{key} of parameter {k}"


@KINDS
@rates
@pytest.mark.parametrize("compat", ["fixed", "v1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_bits_are_those_of_the_cpu_kernel(backend, rate, compat, dtype):
    """With gradients that come late or stay away, so that a step has tensors at several steps."""
    ours, params = made(backend, "cuda", settings_of(rate, compat), dtype)
    truth, others = made("cpu", "cpu", settings_of(rate, compat), dtype)
    for t in range(1, 7):
        for optimizer, tensors in ((ours, params), (truth, others)):
            set_grads(tensors, t, late=True)
            optimizer.step()
        assert_same(ours, params, truth, others)


@KINDS
@rates
def test_a_steady_step_never_waits_for_the_device(backend, rate):
    optimizer, params = made(backend, "cuda", settings_of(rate))
    set_grads(params, 1)
    for _ in range(3):
        optimizer.step()
    with no_waiting():
        optimizer.step()


@KINDS
@rates
def test_launches_do_not_follow_tensors_groups_or_steps(backend, rate):
    """One, and two more for the pass before the update, where there is one."""
    optimizer, params = made(backend, "cuda", settings_of(rate))
    for t in range(1, 6):
        set_grads(params, t, late=True)
        optimizer.step()
    ours, torchs = kernels_of(optimizer.step)
    assert len(ours) == (1 if rate in ("const", "0") else 3), ours
    assert not torchs, torchs


@KINDS
def test_a_captured_step_is_refused(backend):
    optimizer, params = made(backend, "cuda", settings_of("0"))
    set_grads(params, 1)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ones(1, device="cuda")
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(state["step"] == 1 for state in optimizer.state.values())

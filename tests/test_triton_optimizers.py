"""The optimizers on the Triton back-end, interpreted: bit-equal to the reference in every step."""

import inspect

import pytest
import torch
from interpreter import interpreted_fixture  # noqa: F401

from fused_momentum import (
    FusedAutoSGM,
    FusedMomentum,
    FusedNAG,
    FusedSGD,
    FusedSGDSaI,
    backends,
)

CASES = {
    "sgd": (FusedSGD, {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True}),
    "sgd-plain": (FusedSGD, {"decoupled_weight_decay": True, "weight_decay": 0.05}),
    "momentum": (FusedMomentum, {"weight_decay": 0.05}),
    "nag": (FusedNAG, {"weight_decay": 0.05, "maximize": True}),
    "sgd_sai": (FusedSGDSaI, {}),
    "sgd_sai-max": (FusedSGDSaI, {"scale": "gsnr_max", "degenerate": "defer", "maximize": True}),
    "autosgm": (FusedAutoSGM, {"wd_cfg": (0.05, 1)}),
    "autosgm-clipped": (FusedAutoSGM, {"lr_cfg": (True, 0.1, 2)}),
    "autosgm-limited": (FusedAutoSGM, {"lr_cfg": (True, 0.1, 4), "maximize": True}),
}


def trained(name, dtype, backend, default="cpu"):
    """Parameters and states after some steps, while new tensors are made on a default device."""
    torch.manual_seed(0)
    cls, kwargs = CASES[name]
    params = [torch.randn(n).to(dtype).requires_grad_() for n in ((3,), (20, 30), (1030,), ())]
    other = (
        {"lr": 0.01, "momentum": 0.5}
        if "momentum" in inspect.signature(cls).parameters
        else {"eps_cfg": (1e-3,)}
    )
    groups = [{"params": params[:2]}, {"params": params[2:], **other}]
    opt = cls(groups, lr=0.1, backend=backend, **kwargs)
    if hasattr(opt, "initialise"):
        params[1].grad = torch.randn(20, 30).to(dtype)
        with torch.device(default):
            opt.initialise()
    for step in range(4):
        for i, p in enumerate(params):
            late = i == 3 and step < 2
            # SGD-SaI waits for a gradient other than zero.
            grad = torch.randn(p.shape).to(dtype) * (i > 0 or step > 0)
            p.grad = None if late else grad.t().contiguous().t() if i == 1 else grad
        if step == 2:
            opt.param_groups[0]["lr"] = 0.05
        if step == 3:
            opt.found_inf, opt.grad_scale = torch.zeros(1), torch.full((1,), 3.0)
        versions = [p._version for p in params]
        with torch.device(default):
            opt.step()
        moved = [p._version > v for p, v in zip(params, versions, strict=True)]
        assert moved == [p.grad is not None for p in params]
    assert backend in opt.backend
    return [p.detach() for p in params], [s for p in params for s in opt.state[p].values()]


def check(name, dtype, extension):
    from fused_momentum import native

    with pytest.MonkeyPatch.context() as patch:
        if not extension:
            patch.setattr(native, "load", lambda: (None, "none for this test"))
        params, states = trained(name, dtype, "triton", default="meta")
        wanted_params, wanted_states = trained(name, dtype, "reference")
    assert len(states) == len(wanted_states)
    for a, b in zip(params + states, wanted_params + wanted_states, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("extension", [True, False], ids=["extension", "pure-python"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.complex64])
@pytest.mark.parametrize("name", CASES)
def test_training_equals_the_reference(name, dtype, extension, interpreted):
    interpreted(check, name, dtype, extension)


def test_an_explicit_request_is_never_replaced():
    triton = {row.name: row for row in backends()}["triton"]
    if triton.available:
        pytest.skip(f"triton can be used here: {triton.reason}")
    with pytest.raises(RuntimeError, match="no CUDA device"):
        FusedSGD([torch.zeros(3)], backend="triton")

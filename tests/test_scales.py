"""fused_momentum.gsnr: the table of scales."""

import math

import pytest
import torch
from cases import one_thread  # noqa: F401  a fixture for every test here
from torch import nn
from torch.nn import Parameter

import fused_momentum as fm


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 4))
    nn.functional.mse_loss(model(torch.randn(64, 16)), torch.randn(64, 4)).backward()
    return model


def expected(grad):
    grad = grad.double()
    return (grad.norm() / (grad.std() + 1e-8)).item()


GIVEN = {
    "model": (lambda model: model, None),
    "named": (lambda model: model.named_parameters(), None),
    "dict": (lambda model: dict(model.named_parameters()), None),
    "tensors": (lambda model: model.parameters(), [str(i) for i in range(6)]),
    "one_tensor": (lambda model: model[0].weight, ["0"]),
}


@pytest.mark.parametrize(("given", "names"), GIVEN.values(), ids=GIVEN)
def test_every_form_of_parameters(given, names):
    model = network()
    scales = fm.gsnr(given(model))
    assert list(scales) == (names or [name for name, _ in model.named_parameters()])
    for scale, p in zip(scales.values(), model.parameters(), strict=False):
        # float64 sums in two orders: some 2^-53 per element, and std of nearly 0.1 beside the eps
        assert scale.gsnr == pytest.approx(expected(p.grad), rel=1e-12)
        assert scale.numel == p.numel()
        assert scale.ratio == scale.gsnr / math.sqrt(p.numel())


def test_what_has_no_gradient_is_left_out_and_nothing_changes():
    model = network()
    model[3].bias.grad = None
    before = [(p.detach().clone(), p._version) for p in model.parameters()]
    assert "3.bias" not in fm.gsnr(model)
    assert model[3].bias.grad is None
    for p, (value, version) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p._version == version


DEGENERATE = {
    "zero": (torch.zeros(4), 0.0),
    "constant": (torch.full((4,), 0.5), 1.0 / 1e-8),
    "one": (torch.tensor(0.5), 0.5 / 1e-8),
    "nan": (torch.tensor([1.0, math.nan]), math.nan),
    "empty": (torch.zeros(0), 0.0),
}


@pytest.mark.parametrize(("grad", "scale"), DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_gradients_show(grad, scale):
    p = Parameter(torch.ones_like(grad))
    p.grad = grad
    assert fm.gsnr([p])["0"].gsnr == pytest.approx(scale, rel=1e-15, nan_ok=True)


def test_eps_and_complex_tensors():
    grad = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0, 0.0])
    p, z = Parameter(torch.ones(6)), Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad, z.grad = grad, torch.view_as_complex(grad.view(3, 2))
    scales = fm.gsnr({"p": p, "z": z}, eps=0.5)
    assert scales["p"] == scales["z"]
    assert scales["z"].numel == 6
    assert scales["p"].gsnr == pytest.approx(4 / (math.sqrt(16 / 5) + 0.5), rel=1e-15)


@pytest.mark.parametrize("named", [False, True])
def test_an_optimizer_gives_the_scales_that_it_keeps(named):
    model = network()
    params = model.named_parameters() if named else model.parameters()
    optimizer = fm.FusedSGDSaI(params)
    assert fm.gsnr(optimizer) == {}
    optimizer.step()
    measured = fm.gsnr(model)
    optimizer.zero_grad()
    kept = fm.gsnr(optimizer)
    names = [name if named else f"0.{i}" for i, name in enumerate(measured)]
    assert list(kept) == names
    for mine, other in zip(kept.values(), measured.values(), strict=True):
        assert mine.gsnr == pytest.approx(other.gsnr, rel=2**-24)  # rounded to float32 once
        assert mine.numel == other.numel


def test_the_printed_table():
    p, q = Parameter(torch.ones(4, 25)), Parameter(torch.ones(()))
    p.grad, q.grad = torch.tensor([[1.0, -1.0]] * 50).view(4, 25), torch.tensor(2.0)
    lines = repr(fm.gsnr({"matrix": p, "temperature": q})).splitlines()
    assert lines[0].split() == ["numel", "sqrt(numel)", "gsnr", "ratio"]
    assert lines[1].split() == ["matrix", "100", "10", "9.95", "0.995"]
    assert lines[2].split() == ["temperature", "1", "1", "2e+08", "2e+08"]
    assert len(set(map(len, lines))) == 1


BAD = {
    "not_a_tensor": ([3.0], TypeError, "0 is a float; needed: a tensor"),
    "sparse": ("sparse", RuntimeError, r"p.grad is sparse.*dense"),
}


@pytest.mark.parametrize(("given", "kind", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_measured_is_named(given, kind, message):
    if given == "sparse":
        p = Parameter(torch.ones(3))
        p.grad = torch.ones(3).to_sparse()
        given = {"p": p}
    with pytest.raises(kind, match=message):
        fm.gsnr(given)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_scale_beyond_float32_is_infinite(backend):
    p = Parameter(torch.ones(1))
    p.grad = torch.full((1,), 1e35)
    optimizer = fm.FusedSGDSaI([p], degenerate="official", backend=backend)
    optimizer.step()
    assert optimizer.state[p]["gsnr"] == math.inf

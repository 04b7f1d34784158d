"""What FusedSGDSaI saves and loads, its own and that of sgd-sai and pytorch_optimizer."""

import contextlib
import copy
import io

import pytest
import torch
from cases import (
    backends,
    device_of,
    one_thread,  # noqa: F401  a fixture for every test here
    values,
)
from test_sgd_sai import FLOAT32, give, numbers, stepped
from torch import nn
from torch.nn import Parameter

from fused_momentum import FusedSGDSaI

SHAPES = [(7, 5), (3, 4, 2), (64,), (1030,)]
SETTINGS = {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.1, "eps": 1e-6}


def starts(dtype=torch.float32, device="cpu"):
    return [Parameter(values(s, dtype, i).to(device, copy=True)) for i, s in enumerate(SHAPES)]


def train(optimizer, params, steps, dtype=torch.float32):
    for step in steps:
        give(params, [values(s, dtype, 100 * step + i + 9) for i, s in enumerate(SHAPES)])
        with contextlib.redirect_stdout(io.StringIO()):  # sgd-sai prints
            optimizer.step()
    return params


def copies(params):
    return [Parameter(p.detach().clone()) for p in params]


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- its own ---------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("scale", ["gsnr", "gsnr_max", "sqrt_numel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_resuming_equals_never_having_stopped(scale, dtype, steps, backend):
    options = SETTINGS | {"scale": scale, "backend": backend}
    params = starts(dtype, device_of(backend))
    optimizer = FusedSGDSaI(params, **options)
    train(optimizer, params, range(steps), dtype)
    others = copies(params)
    other = FusedSGDSaI(others, **options)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for p, q in zip(params, others, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, mine in optimizer.state[p].items():
            assert other.state[q][key].dtype == mine.dtype
            assert torch.equal(other.state[q][key], mine)
    train(optimizer, params, range(steps, 6), dtype)
    train(other, others, range(steps, 6), dtype)
    assert all(map(torch.equal, params, others))
    assert [numbers(optimizer, p) for p in params] == [numbers(other, p) for p in others]


def test_the_scale_keeps_its_bits_beside_bfloat16_parameters():
    params = starts(torch.bfloat16)
    optimizer = FusedSGDSaI(params)
    train(optimizer, params, range(1), torch.bfloat16)
    scales = [numbers(optimizer, p)["gsnr"] for p in params]
    assert all(scale != torch.tensor(scale).bfloat16().item() for scale in scales)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [numbers(optimizer, p)["gsnr"] for p in params] == scales


@pytest.mark.parametrize("degenerate", ["bound", "defer"])
def test_a_tensor_that_waits_is_saved_as_waiting(degenerate):
    """Zeros, then a constant, then an ordinary gradient; saved and loaded after each."""
    grads = [torch.zeros(6), torch.full((6,), 0.5), values((6,), torch.float32, 1)]
    ends = []
    for reloads in (False, True):
        p = Parameter(torch.ones(6))
        optimizer = FusedSGDSaI([p], degenerate=degenerate)
        for grad in grads * 2:
            give([p], [grad])
            optimizer.step()
            if reloads:
                saved = through_file(optimizer.state_dict())
                optimizer = FusedSGDSaI([p], degenerate=degenerate)
                optimizer.load_state_dict(saved)
        ends.append([p, *optimizer.state[p].values()])
    assert all(map(torch.equal, *ends))


# --- sgd-sai 1.0.3 ---------------------------------------------------------------------------


@pytest.fixture
def SGD_sai():
    reason = "the official package is not here: pip install sgd-sai"
    return pytest.importorskip("sgd_sai", reason=reason).SGD_sai


def assert_close(ours, theirs):
    """2e-6 of the largest entry: a few roundings of float32, in another order, a step."""
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() <= 2e-6 * q.abs().max()


@backends
@pytest.mark.parametrize("degenerate", ["official", "bound"])
def test_plain_runs_equal_sgd_sai(degenerate, backend, SGD_sai):
    ours, theirs = starts(device=device_of(backend)), starts()
    train(FusedSGDSaI(ours, degenerate=degenerate, backend=backend, **SETTINGS), ours, range(8))
    train(SGD_sai(theirs, **SETTINGS), theirs, range(8))
    assert_close([p.detach().cpu() for p in ours], theirs)
    assert not any(torch.equal(p, q) for p, q in zip(theirs, starts(), strict=True))


def test_training_a_network_equals_sgd_sai(SGD_sai):
    """A gradient follows the parameters, so a difference may grow; in 10 steps it does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 4))
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    ends = []
    for cls, options in ((FusedSGDSaI, {"degenerate": "official"}), (SGD_sai, {})):
        net = copy.deepcopy(model)
        optimizer = cls(net.parameters(), lr=3e-3, **options)
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            with contextlib.redirect_stdout(io.StringIO()):
                optimizer.step()
        ends.append([p.detach() for p in net.parameters()])
    assert_close(*ends)


@backends
@pytest.mark.parametrize("scale", ["gsnr", "gsnr_max"])
def test_a_state_of_sgd_sai_loads_and_continues(scale, backend, SGD_sai):
    theirs = starts()
    official = SGD_sai(theirs, **SETTINGS)
    train(official, theirs, range(3))
    ours = [Parameter(p.detach().to(device_of(backend), copy=True)) for p in theirs]
    optimizer = FusedSGDSaI(ours, lr=9.0, scale=scale, backend=backend)
    optimizer.load_state_dict(through_file(official.state_dict()))
    assert optimizer.param_groups[0]["lr"] == SETTINGS["lr"]
    scales = [official.state[p]["gsnr"].item() for p in theirs]
    if scale == "gsnr_max":  # the same step where theirs is divided by hand
        official.param_groups[0]["lr"] /= max(scales)
        official.param_groups[0]["weight_decay"] *= max(scales)
    train(official, theirs, range(3, 6))
    train(optimizer, ours, range(3, 6))
    assert [numbers(optimizer, p)["gsnr"] for p in ours] == scales
    assert_close([p.detach().cpu() for p in ours], theirs)


def test_sgd_sai_reads_a_state_of_ours(SGD_sai):
    ours = starts()
    optimizer = FusedSGDSaI(ours, **SETTINGS)
    train(optimizer, ours, range(3))
    theirs = copies(ours)
    official = SGD_sai(theirs)
    official.load_state_dict(through_file(optimizer.state_dict()))
    official.has_warmup = True  # else it measures anew: its bug 3
    train(official, theirs, range(3, 6))
    train(optimizer, ours, range(3, 6))
    assert_close(ours, theirs)


@pytest.mark.parametrize("degenerate", ["bound", "official"])
def test_a_tensor_that_sgd_sai_has_frozen_moves_again_unless_official(degenerate, SGD_sai):
    frozen = Parameter(torch.ones(8))
    official = SGD_sai([frozen], weight_decay=0.0)
    for grad in (torch.zeros(8), values((8,), torch.float32, 1)):
        give([frozen], [grad])
        with contextlib.redirect_stdout(io.StringIO()):
            official.step()
    assert torch.equal(frozen, torch.ones(8))
    optimizer = FusedSGDSaI([frozen], degenerate=degenerate)
    optimizer.load_state_dict(through_file(official.state_dict()))
    buffer, grad = (
        optimizer.state[frozen]["momentum_buffer"].clone(),
        values((8,), torch.float32, 2),
    )
    give([frozen], [grad])
    optimizer.step()
    assert torch.equal(frozen, torch.ones(8)) == (degenerate == "official")
    # The buffer goes on from where it was.
    went = optimizer.state[frozen]["momentum_buffer"]
    assert torch.allclose(went, 0.9 * buffer + 0.1 * grad, rtol=1e-6, atol=1e-7)


def test_scales_that_are_not_finite_are_measured_anew():
    _, (p,) = stepped(values((8,), torch.float32, 1))
    for scale in (0.0, float("nan"), float("inf"), -1.0):
        state = {"momentum_buffer": torch.ones(8), "gsnr": torch.tensor(scale)}
        optimizer = FusedSGDSaI([p])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
        assert numbers(optimizer, p)["stage"] == 2.0
        optimizer.step()
        expected = stepped(values((8,), torch.float32, 1))
        assert numbers(optimizer, p) == numbers(expected[0], expected[1][0])


# --- pytorch_optimizer -----------------------------------------------------------------------


@pytest.fixture
def SGDSaI():
    reason = "the port is not here: pip install pytorch_optimizer"
    return pytest.importorskip("pytorch_optimizer", reason=reason).SGDSaI


@backends
@pytest.mark.parametrize("momentum", [0.8, 0.0])
def test_a_state_of_pytorch_optimizer_loads_and_continues(momentum, backend, SGDSaI):
    theirs = starts()
    port = SGDSaI(theirs, **SETTINGS | {"momentum": momentum})
    train(port, theirs, range(3))
    ours = [Parameter(p.detach().to(device_of(backend), copy=True)) for p in theirs]
    optimizer = FusedSGDSaI(ours, backend=backend)
    optimizer.load_state_dict(through_file(port.state_dict()))
    train(port, theirs, range(3, 6))
    train(optimizer, ours, range(3, 6))
    assert_close([p.detach().cpu() for p in ours], theirs)
    scales = [port.state[p]["gsnr"].item() for p in theirs]
    assert [numbers(optimizer, p)["gsnr"] for p in ours] == pytest.approx(scales, rel=FLOAT32)


def test_decay_through_the_gradient_is_refused(SGDSaI):
    theirs = starts()
    port = SGDSaI(theirs, weight_decouple=False, weight_decay=0.1)
    train(port, theirs, range(1))
    ours = copies(theirs)
    optimizer = FusedSGDSaI(ours)
    train(optimizer, ours, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"param_groups\[0\] has weight_decouple=False.*0\.1"):
        optimizer.load_state_dict(port.state_dict())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for i, state in before["state"].items():
        assert all(torch.equal(t, after["state"][i][key]) for key, t in state.items())
    port.param_groups[0]["weight_decay"] = 0.0
    optimizer.load_state_dict(port.state_dict())


# --- errors ----------------------------------------------------------------------------------

BAD = {
    "a_number": ({"gsnr": 2.0}, TypeError, "gsnr of parameter 0 is a float; needed: a tensor"),
    "two_scales": (
        {"gsnr": torch.ones(2)},
        ValueError,
        r"gsnr of parameter 0 has shape \[2\]; needed: \[\]",
    ),
    "buffer": (
        {"gsnr": torch.ones(()), "momentum_buffer": torch.ones(3)},
        ValueError,
        r"momentum_buffer of parameter 0 has shape \[3\]; needed: \[8\]",
    ),
    "another": (
        {"exp_avg": torch.ones(8)},
        ValueError,
        r"state of parameter 0 has \['exp_avg'\]; needed: \['momentum_buffer', 'gsnr'",
    ),
}


@pytest.mark.parametrize(("state", "kind", "message"), BAD.values(), ids=BAD)
def test_a_state_that_does_not_fit_raises_and_changes_nothing(state, kind, message):
    optimizer, (p,) = stepped(values((8,), torch.float32, 1))
    before = copy.deepcopy(optimizer.state[p])
    groups = optimizer.state_dict()["param_groups"]
    with pytest.raises(kind, match=message):
        optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
    assert all(torch.equal(t, optimizer.state[p][key]) for key, t in before.items())


@backends
def test_a_word_that_is_written_into_a_group_is_checked_by_the_step(backend):
    optimizer, (p,) = stepped(values((8,), torch.float32, 1), backend)
    before = p.detach().clone()
    optimizer.param_groups[0]["scale"] = "none"
    with pytest.raises(ValueError, match=r"scale='none' is not one of"):
        optimizer.step()
    assert torch.equal(p, before)

"""Every known bug of sgd-sai 1.0.3 and its ports, in the order in which they were gathered."""

import copy
import math
import pickle

import pytest
import torch
from cases import (
    backends,
    device_of,
    one_thread,  # noqa: F401  a fixture for every test here
    values,
)
from test_sgd_sai import give, numbers, scale_of, stepped
from torch import nn
from torch.nn import Parameter

from fused_momentum import FusedSGDSaI

DEGENERATE = pytest.mark.parametrize("degenerate", ["bound", "defer"])


def params_on(backend, *sizes):
    return [Parameter(torch.ones(n, device=device_of(backend))) for n in sizes]


# --- 1. momentum=0 ---------------------------------------------------------------------------


@backends
def test_without_momentum_there_is_no_buffer(backend):
    grads = [values((6,), torch.float64, k) for k in (1, 2)]
    start = values((6,), torch.float64, 0)
    p = Parameter(start.clone().to(device_of(backend)))
    optimizer = FusedSGDSaI([p], momentum=0.0, lr=0.5, weight_decay=0.0, backend=backend)
    for grad in grads:
        give([p], [grad])
        optimizer.step()
    assert optimizer.state[p].keys() == {"gsnr", "stage"}
    rate = 0.5 * scale_of(grads[0])
    expected = start - rate * grads[0] - rate * grads[1]
    assert torch.equal(p.detach().cpu(), expected)


@backends
def test_groups_with_and_without_momentum_do_not_share_a_buffer(backend):
    params = params_on(backend, 6, 6)
    twins = [Parameter(p.detach().clone()) for p in params]
    groups = [{"params": params[:1]}, {"params": params[1:], "momentum": 0.0}]
    optimizers = [FusedSGDSaI(groups, backend=backend), FusedSGDSaI(twins[:1], backend=backend)]
    optimizers.append(FusedSGDSaI(twins[1:], momentum=0.0, backend=backend))
    for step in range(3):
        give(params + twins, [values((6,), torch.float32, 10 * step + i) for i in (0, 1)] * 2)
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(torch.equal, params, twins))
    assert not torch.equal(*params)


# --- 2. gradients that come late -------------------------------------------------------------


def _unfreeze(optimizer, p):
    p.requires_grad_()


def _join(optimizer, p):
    optimizer.add_param_group({"params": [p]})


@backends
@pytest.mark.parametrize("come", [None, _unfreeze, _join], ids=["late", "unfrozen", "joined"])
def test_a_tensor_may_come_late(come, backend):
    early, late, alone = params_on(backend, 6, 6, 6)
    late.requires_grad_(come is not _unfreeze)
    optimizer = FusedSGDSaI([early] if come is _join else [early, late], backend=backend)
    other = FusedSGDSaI([alone], backend=backend)
    grads = [values((6,), torch.float32, k) for k in range(5)]
    for step, grad in enumerate(grads):
        if step == 2 and come:
            come(optimizer, late)
        give([early, late], [grad, grad if step >= 2 else None])
        optimizer.step()
        if step < 2:
            assert torch.equal(late, torch.ones_like(late))
            assert late not in optimizer.state
        else:
            give([alone], [grad])
            other.step()
    assert torch.equal(late, alone)
    assert numbers(optimizer, late)["gsnr"] == scale_of(grads[2])
    assert numbers(optimizer, early)["gsnr"] == scale_of(grads[0])


# --- 3. copies and checkpoints ---------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@backends
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_copy_keeps_the_scale_and_goes_on(copied, steps, backend):
    params = params_on(backend, 6, 3)
    optimizer = FusedSGDSaI(params, backend=backend)
    rows = [[values((n,), torch.float32, 10 * k + n) for n in (6, 3)] for k in range(4)]
    for row in rows[:steps]:
        give(params, row)
        optimizer.step()
    others, other = copied((params, optimizer))
    for row in rows[steps:]:
        for tensors, each in ((params, optimizer), (others, other)):
            give(tensors, row)
            each.step()
    assert all(map(torch.equal, params, others))
    assert [numbers(optimizer, p) for p in params] == [numbers(other, p) for p in others]


# --- 4. a first gradient of zeros ------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen linear layer, and the product of two narrow ones beside it, the second zero."""

    def __init__(self, frozen, rank=1):
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.a = nn.Linear(frozen.in_features, rank, bias=False)
        self.b = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.frozen(x) + self.b(self.a(x))


def _adapted():
    """A pretrained network with LoRA on both layers, and a task whose first layer has moved."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(256, 16)
    with torch.no_grad():
        shift = torch.randn(32, 1) @ torch.randn(1, 16) / 8
        target = model[2](torch.tanh(model[0](x) + x @ shift.T))
    return nn.Sequential(LoRA(model[0]), nn.Tanh(), LoRA(model[2])), x, target


def _fine_tune(degenerate):
    """The losses, how far each factor has moved, and the optimizer."""
    torch.manual_seed(0)
    model, x, target = _adapted()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = FusedSGDSaI(trained.items(), lr=0.2, weight_decay=0.0, degenerate=degenerate)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: (p - start[n]).norm().item() for n, p in trained.items()}, optimizer


def test_lora_trains_its_first_factor():
    (first, *_, last), moved, _ = _fine_tune("official")
    assert [name for name, by in moved.items() if by == 0.0] == ["0.a.weight", "2.a.weight"]
    for degenerate in ("bound", "defer"):
        losses, moved, optimizer = _fine_tune(degenerate)
        assert losses[0] == first
        assert losses[-1] < 0.25 * last
        assert min(moved.values()) > 0.01
        for p in optimizer.param_groups[0]["params"]:
            kept = numbers(optimizer, p)
            assert kept["gsnr"] > 0.999 * math.sqrt(p.numel() - 1)  # eps takes the rest
            assert kept["stage"] == 3


@backends
@DEGENERATE
def test_the_first_gradient_that_is_not_zero_counts_as_the_first(degenerate, backend):
    waiting, alone = params_on(backend, 6, 6)
    options = {"degenerate": degenerate, "backend": backend, "weight_decay": 0.0}
    optimizer, other = FusedSGDSaI([waiting], **options), FusedSGDSaI([alone], **options)
    for step in range(5):
        grad = values((6,), torch.float32, step)
        give([waiting, alone], [grad if step >= 2 else torch.zeros(6), grad])
        optimizer.step()
        if step >= 2:
            other.step()
    assert torch.equal(waiting, alone)
    assert numbers(optimizer, waiting) == numbers(other, alone)


# --- 5. float16 ------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_stay_finite(dtype, backend):
    large = (values((2000,), torch.float32, 1) * 2000).to(dtype)  # its norm exceeds 65504
    for grad in (torch.zeros(8, dtype=dtype), torch.full((1,), 8.0, dtype=dtype), large):
        optimizer, (p,) = stepped(grad, backend, lr=1e-6)
        give([p], [torch.full_like(grad, 0.5)])
        optimizer.step()
        assert p.isfinite().all()
        assert optimizer.state[p]["gsnr"].isfinite()
        assert optimizer.state[p]["gsnr"].dtype == torch.float32
    assert 44 < numbers(optimizer, p)["gsnr"] < 45


# --- 6. one element, or equal ones -----------------------------------------------------------


@backends
@DEGENERATE
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (9,), (3, 3)], ids=str)
def test_one_element_or_equal_ones_do_not_explode(shape, degenerate, backend):
    grad = torch.full(shape, 0.5)
    optimizer, (p,) = stepped(grad, backend, lr=0.1, degenerate=degenerate)
    scale = math.sqrt(max(grad.numel() - 1, 1))
    assert numbers(optimizer, p)["gsnr"] == pytest.approx(scale, rel=2**-23)
    assert p.abs().max().item() == pytest.approx(0.1 * scale * 0.5, rel=1e-6)


# --- 7. printing; test_gpu_sgd_sai.py has the waiting, test_training_loop.py the compiling -------


@backends
def test_nothing_is_printed(backend, capfd):
    optimizer, _ = stepped(values((8,), torch.float32, 1), backend)
    optimizer.step()
    assert capfd.readouterr() == ("", "")


# --- 8. the closure --------------------------------------------------------------------------


@backends
def test_the_closure_is_called_once_and_one_gradient_serves_both(backend):
    grads = iter([values((8,), torch.float32, k) for k in (1, 2)])
    (p,) = params_on(backend, 8)
    optimizer, seen = FusedSGDSaI([p], backend=backend), []

    def closure():
        seen.append(next(grads))
        give([p], seen[-1:])
        return 0.25

    assert optimizer.step(closure) == 0.25
    (grad,) = seen
    assert numbers(optimizer, p)["gsnr"] == scale_of(grad)
    assert torch.equal(optimizer.state[p]["momentum_buffer"].cpu(), grad)


# --- 9. sparse tensors; shard_cases.py has 10., the sharded ones ------------------------------


def test_sparse_gradients_are_refused_by_name():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer = FusedSGDSaI(embedding.parameters())
    message = r"param_groups\[0\]\['params'\]\[0\].grad is sparse.*make it dense"
    for attempt in (optimizer.step, optimizer.initialise):
        with pytest.raises(RuntimeError, match=message):
            attempt()


# --- 11. arguments of torch.optim.SGD --------------------------------------------------------


def test_a_configuration_for_torch_sgd_is_accepted():
    grad = values((8,), torch.float32, 1)
    (p,) = stepped(grad, dampening=0, nesterov=False, foreach=False, fused=None)[1]
    assert torch.equal(p, stepped(grad)[1][0])
    with pytest.raises(ValueError, match=r"FusedSGDSaI has no dampening .*nesterov=True"):
        FusedSGDSaI([p], nesterov=True)


# --- of the ports: the negated gradient, and the one-dimensional tensor ------------------------


@backends
def test_maximize_is_the_negated_gradient(backend):
    ends = []
    for sign, maximize in ((1, False), (-1, True)):
        (p,) = params_on(backend, 8)
        optimizer = FusedSGDSaI([p], maximize=maximize, backend=backend)
        for key in (1, 2):
            grad = sign * values((8,), torch.float32, key)
            give([p], [grad])
            optimizer.step()
            assert torch.equal(p.grad.cpu(), grad)
        ends.append([p, *optimizer.state[p].values()])
    assert all(map(torch.equal, *ends))


@backends
@pytest.mark.parametrize("shape", [(64,), (1, 64), (8, 8), (2, 4, 8)], ids=str)
def test_the_shape_does_not_matter(shape, backend):
    grad = values((64,), torch.float32, 1)
    assert scale_of(grad.view(shape), backend) == scale_of(grad, backend)
    assert 7.9 < scale_of(grad * 1e-4, backend, eps=0.0) < 8.1

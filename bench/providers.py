"""What is compared: our optimizer and the three ways of torch.optim.SGD."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

import fused_momentum as fm

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
OURS, FOR_LOOP, FOREACH, FUSED = "ours", "torch for-loop", "torch foreach", "torch fused"
BASELINES = (FOR_LOOP, FOREACH, FUSED)


def make(provider: str, params: list[Tensor], backend: str = "auto") -> Optimizer:
    """The provider's optimizer over `params`, with `HYPER`."""
    if provider == OURS:
        return fm.FusedSGD(params, **HYPER, backend=backend)
    return SGD(params, **HYPER, foreach=provider == FOREACH, fused=provider == FUSED)


@dataclass
class Arena:
    """Parameters and gradients of one case and dtype, shared by all providers.

    Only the momentum buffers are a provider's own, so a case needs little memory and every provider
    works on the same pages. `grads` are constant: no provider may change them.
    """

    dtype: torch.dtype
    params: list[Tensor]
    grads: list[Tensor] = field(default_factory=list)


def build(shapes, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Arena:
    """Random parameters (|p| < 0.1) and gradients (|g| < 0.02), each its own allocation.

    Sizes as in training, and chosen so that three steps move a parameter by far more than one
    bf16 rounding: an update that does nothing cannot pass the gate.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(scale: float) -> list[Tensor]:
        new = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        return [tensor.uniform_(-scale, scale, generator=generator) for tensor in new]

    arena = Arena(dtype, random(0.1), random(0.02))
    for param, grad in zip(arena.params, arena.grads, strict=True):
        param.grad = grad
    return arena


def bytes_moved(numel: int, param: torch.dtype, state: torch.dtype | None = None) -> int:
    """Bytes that one step must read and write: p twice, g once, and the momentum buffer twice.

    `state` is the dtype of the momentum buffer, None without momentum; gradients have the dtype of
    their parameter. fp32 with momentum: 20 bytes an element.
    """
    return numel * (3 * param.itemsize + (2 * state.itemsize if state else 0))


def state_dtype(optimizer: Optimizer, param: Tensor) -> torch.dtype | None:
    """The dtype in which the optimizer holds the momentum of `param`; None if it holds none."""
    buffer = optimizer.state[param].get("momentum_buffer")
    return None if buffer is None else buffer.dtype


def backend_of(provider: str, optimizer: Optimizer) -> str:
    """What ran: for ours the device, the back-end and why."""
    return optimizer.backend if provider == OURS else provider.removeprefix("torch ")


def bytes_needed(numel: int, dtypes, providers) -> int:
    """Bytes that a case needs: p, g, every provider's momentum, and the largest temporary."""
    total = max(dtype.itemsize for dtype in dtypes)  # foreach adds the decay out of place
    for dtype in dtypes:
        states = [max(4, dtype.itemsize) if name == OURS else dtype.itemsize for name in providers]
        total += 2 * dtype.itemsize + sum(states)
    return numel * total

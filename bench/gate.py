"""The correctness gate: no provider is timed before its three first steps are shown to be right."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from bench.providers import FOR_LOOP, OURS, Arena, make

STEPS = 3
LIMIT = 2**14  # elements of a tensor that are compared


class GateError(RuntimeError):
    """Our optimizer disagrees with the oracle."""


@dataclass(frozen=True)
class Verdict:
    """Largest absolute error after `STEPS` steps against float64, and what is allowed."""

    error: float
    bound: float
    problem: str = ""


def sample(tensors: list[Tensor]) -> list[Tensor]:
    """At most about `LIMIT` elements of each tensor, copied, the last one among them.

    The stride is odd, so that every lane of a vector and every place in a tile occurs. The update
    is elementwise: a step over the samples is the step over the tensors, seen at those elements.
    """
    samples = []
    for tensor in tensors:
        flat = tensor.detach().flatten()
        stride = flat.numel() // LIMIT | 1
        samples.append(torch.cat([flat[::stride], flat[-1:]]))
    return samples


def stepped(provider: str, params: list[Tensor], grads: list[Tensor], **options) -> list[Tensor]:
    """`params` after `STEPS` steps from fresh state; changed in place and returned."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = make(provider, params, **options)
    for _ in range(STEPS):
        optimizer.step()
    return params


def largest_error(got: list[Tensor], truth: list[Tensor]) -> float:
    """Largest |got - truth|; NaN if either holds one."""
    return max((a.double() - b).abs().max().item() for a, b in zip(got, truth, strict=True))


def judge(provider: str, arena: Arena, optimizer: Optimizer) -> Verdict:
    """Take the first three steps of `optimizer` and compare with a float64 for-loop.

    The bound is twice the error of torch's own for-loop in the dtype of the parameters: ours rounds
    once per operation, torch once per fused multiply-add, hence at most twice as often. For fp32
    ours must besides be bit-equal to its reference back-end.
    """
    start, grads = sample(arena.params), sample(arena.grads)
    for _ in range(STEPS):
        optimizer.step()
    got = sample(arena.params)

    truth = stepped(FOR_LOOP, [p.double() for p in start], [g.double() for g in grads])
    own = stepped(FOR_LOOP, [p.clone() for p in start], [g.clone() for g in grads])
    error, bound = largest_error(got, truth), 2 * largest_error(own, truth)
    problem = ""
    if all(map(torch.equal, got, start)):
        problem = "parameters not updated"
    elif not error <= bound:  # NaN fails too
        problem = f"error {error:.1e} above {bound:.1e}"
    elif provider == OURS and arena.dtype == torch.float32:
        reference = stepped(OURS, start, grads, backend="reference")
        if not all(map(torch.equal, got, reference)):
            problem = "not bit-equal to the reference back-end"
    if not all(map(torch.equal, sample(arena.grads), grads)):
        problem = "gradients changed"
    return Verdict(error, bound, problem)

"""The correctness gate: no provider is timed before its three first steps are shown to be right."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from bench.arena import Arena, compared
from bench.providers import Provider

# What the gradients are multiplied with before each of the first steps, in place: powers of two are
# exact, and with the same gradient at every step a rule that divides by its size would look right
# with any average.
FACTORS = (1.0, 0.5, 2.0)
ANOTHER_RULE = "another rule"


class GateError(RuntimeError):
    """Our optimizer disagrees with the oracle."""


@dataclass(frozen=True)
class Verdict:
    """Largest absolute error after the first steps against float64, and what is allowed."""

    error: float | str
    bound: float | str
    problem: str = ""


def take_steps(optimizer, grads: list[Tensor]) -> None:
    """A step for each of `FACTORS`; `grads` are as before when it is done."""
    for factor in FACTORS:
        torch._foreach_mul_(grads, factor)
        optimizer.step()
    torch._foreach_mul_(grads, 1 / prod(FACTORS))


def stepped(make, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """`params` after the steps from fresh state; changed in place and returned."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    take_steps(make(params), grads)
    return params


def largest_error(got: list[Tensor], truth: list[Tensor]) -> float:
    """Largest |got - truth|; NaN if either holds one."""
    errors = [(a.double() - b).abs().max() for a, b in zip(got, truth, strict=True)]
    return torch.stack(errors).max().item()  # of several maxima, Python's would lose a NaN


def judge(provider: Provider, arena: Arena, optimizer) -> Verdict:
    """Take the first three steps of `optimizer`, and compare with `provider.truth` in float64.

    The bound is twice the error of the same truth in the dtype of the parameters: some round once
    per operation, some once per fused multiply-add, hence at most twice as often; more where the
    provider says that it rounds more often, and twice that for rounding at random in low precision.
    For fp32 ours must besides be bit-equal to its reference back-end.
    """
    arena.fill()
    start = compared(arena.params, provider.whole)
    grads = compared(arena.grads, provider.whole)
    every_grad = compared(arena.grads, False)
    take_steps(optimizer, arena.grads)
    got = compared(arena.params, provider.whole)
    if not arena.is_complete() or not all(
        map(torch.equal, compared(arena.grads, False), every_grad)
    ):
        return Verdict("", "", "gradients changed")
    if provider.truth is None:
        return Verdict("", "", "" if _moved(got, start) else "parameters not updated")

    exact = stepped(provider.truth, [p.double() for p in start], [g.double() for g in grads])
    rounded = stepped(provider.truth, [p.clone() for p in start], grads)
    error = largest_error(got, exact)
    bound = 2 * provider.roundings * largest_error(rounded, exact)
    if provider.stochastic and arena.dtype.itemsize < 4:
        bound *= 2
    problem = ""
    if _moved(rounded, start) and not _moved(got, start):
        problem = "parameters not updated"
    elif not error <= bound:  # NaN fails too
        problem = f"error {error:.1e} above {bound:.1e}"
    elif provider.is_ours and arena.dtype == torch.float32:
        reference = stepped(lambda p: provider.make(p, backend="reference"), start, grads)
        if not all(map(torch.equal, got, reference)):
            problem = "not bit-equal to the reference back-end"
    return Verdict(error, bound, problem)


def _moved(now: list[Tensor], before: list[Tensor]) -> bool:
    """Whether the tensors are others than before, and finite."""
    finite = all(tensor.isfinite().all() for tensor in now)
    return finite and not all(map(torch.equal, now, before))

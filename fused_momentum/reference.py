"""The plain-torch back-end: slow, short, and the truth that every kernel is compared with.

This is the only place where the rounding points are written down: load to the type that the rule
computes in (float64 for float64 parameters, else float32), multiply the gradient by the gradient
multiplier, run the rule, round once to each stream's own type (a float64 on its way to a half
through float32, as torch does). Nothing else rounds. Numbers of a
whole tensor are float64, until they are rounded once to the type that the rule computes in, or to
that in which they are kept.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from .rules import Rule

TILE = 1024  # elements; the same in every back-end (csrc/launch.h)


def compute_dtype(param: torch.Tensor) -> torch.dtype:
    """The type in which a parameter's update is computed."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def scalars_of(rule: Rule, numbers: Sequence[float], dtype: torch.dtype) -> list[float]:
    """The rule's scalars, derived in float64 and rounded once to ``dtype``.

    ``numbers``: hyper-parameters, scalars of the tensor, kept numbers.
    """
    derived = rule.derive(*map(float, numbers))
    if dtype == torch.float64:
        return [float(value) for value in derived]
    return [ctypes.c_float(value).value for value in derived]


def tensor_sum(x: torch.Tensor) -> float:
    """The sum of all elements in float64, in the order that every back-end keeps to.

    A tile of 1024 elements, zero padded, is summed by halving: x[i] += x[i + h], h = 512, 256, ...
    1. Lane j of 1024 then adds the sums of the tiles j, j + 1024, ... in that order to 0, and the
    lanes are halved in the same way. Elements are in the order of the parameter's memory.
    """
    lanes = x.new_zeros(TILE, dtype=torch.float64)
    for tile_sums in _halved(x.double()).split(TILE):
        lanes[: len(tile_sums)] += tile_sums
    return _halved(lanes).item()


def _halved(x: torch.Tensor) -> torch.Tensor:
    """The sum of each tile."""
    x = torch.nn.functional.pad(x, (0, -len(x) % TILE)).view(-1, TILE)
    while x.shape[1] > 1:
        x = torch.add(*x.chunk(2, dim=1))
    return x[:, 0]


def numel_of(tensor: torch.Tensor) -> int:
    """How many real numbers a tensor has."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _in_memory_order(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor, in the order in which those of ``like`` lie in memory."""
    dims = sorted(range(like.ndim), key=like.stride, reverse=True)
    return tensor.expand(like.shape).permute(dims).reshape(-1)


def numbers_of(rule: Rule, kept: Sequence[torch.Tensor | None]) -> list[float]:
    """The numbers kept for a tensor; absent ones are as they begin."""
    return [
        k.initial if tensor is None else tensor.item()
        for k, tensor in zip(rule.kept, kept, strict=True)
    ]


def is_settled(rule: Rule, hyper: Sequence[float], kept: Sequence[torch.Tensor | None]) -> bool:
    """Whether what there is to measure of a tensor with these kept numbers has been."""
    return bool(rule.measure.settled(*hyper, *numbers_of(rule, kept)))


def settle(
    rule: Rule,
    hyper: Sequence[float],
    kept: Sequence[torch.Tensor | None],
    sums: Sequence[float],
    numel: int,
    updates: bool,
) -> list[float]:
    """Settle what follows from the sums over a tensor of ``numel`` elements.

    Writes the kept numbers, and returns the tensor's scalars of this step.
    """
    count = len(rule.tensor_scalars)
    numbers = map(float, (numel, updates, *numbers_of(rule, kept), *sums))
    settled = rule.measure.settle(*hyper, *numbers)
    for tensor, number in zip(kept, settled[count:], strict=True):
        if tensor is not None:
            # fill_ raises where the number is beyond the type's range, instead of rounding it.
            single = tensor.dtype == torch.float32
            tensor.fill_(ctypes.c_float(number).value if single else number)
    return list(settled[:count])


class Update:
    """One step of one parameter: its tensors as the rule takes them, and what it gives back."""

    def __init__(
        self,
        rule: Rule,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Sequence[torch.Tensor | None],
        kept: Sequence[torch.Tensor | None],
        hyper: Sequence[float],
        *,
        grad_multiplier: float = 1.0,
        first: bool = False,
    ):
        """``hyper``: the rule's hyper-parameters in its order. A state of None is absent: it reads
        as zero, a kept number as what it begins with, and is not written. ``first`` says that this
        is the parameter's first step; other ``tensor_scalars`` begin at 0.
        """
        self._rule, self._hyper = rule, list(hyper)
        self._dtype = compute_dtype(param)
        self._param, self._states, self._kept = _real(param), states, kept
        self._grad = _real(grad).to(self._dtype) * grad_multiplier
        self._tensor_scalars = [float(first), *(0.0 for _ in rule.tensor_scalars[1:])]

    def settled(self) -> bool:
        """Whether there is nothing to measure."""
        return self._param.numel() == 0 or is_settled(self._rule, self._hyper, self._kept)

    def measure(self, updates: bool = True) -> None:
        """Run the pass before the update, and settle what follows from its sums.

        ``updates``: the update follows.
        """
        numel = self._param.numel()
        self._tensor_scalars = settle(
            self._rule, self._hyper, self._kept, self.sums(), numel, updates
        )

    def sums(self) -> list[float]:
        """Run the pass before the update; return the sums of its terms."""
        rule = self._rule
        written, terms = self._run(rule.measure.terms, rule.measure.writes)
        self._store(rule.measure.writes, written)
        terms = [t.expand(self._param.shape) for t in terms]
        return [tensor_sum(_in_memory_order(t, self._param)) for t in terms]

    def update(self) -> None:
        """Update the parameter and its states in place; the gradient is left as it is."""
        names = self._rule.written
        (new_param, *_), new_states = self._run(self._rule.update, names, leading=1)
        self._param.copy_(new_param)
        self._store(names, new_states)

    def _run(self, function: Callable, names: Sequence[str], leading: int = 0):
        """What a pass returns: the states that it names and the rest, before and after them."""
        numbers = (*self._hyper, *self._tensor_scalars, *numbers_of(self._rule, self._kept))
        scalars = scalars_of(self._rule, numbers, self._dtype)
        p = self._param.to(self._dtype)
        loaded = [
            torch.zeros_like(p) if s is None else _real(s).to(self._dtype) for s in self._states
        ]
        result = function(p, self._grad, *loaded, *scalars)
        if leading:
            return result[:leading], result[leading:]
        return result[: len(names)], result[len(names) :]

    def _store(self, names: Sequence[str], values: Sequence[torch.Tensor]) -> None:
        states = {s.name: t for s, t in zip(self._rule.states, self._states, strict=True)}
        for name, value in zip(names, values, strict=True):
            if states[name] is not None:
                _real(states[name]).copy_(value)


def update(rule: Rule, param, grad, states, hyper, **more) -> None:
    """Update one parameter by a rule that keeps no numbers; arguments are those of ``Update``."""
    Update(rule, param, grad, states, (), hyper, **more).update()

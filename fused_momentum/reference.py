"""The plain-torch back-end: slow, short, and the truth that every kernel is compared with.

This is the only place where the rounding points are written down: load to the type that the rule
computes in (float64 for float64 parameters, else float32), multiply the gradient by the gradient
multiplier, run the rule, round once to each stream's own type. Nothing else rounds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from .rules import Rule


def compute_dtype(param: torch.Tensor) -> torch.dtype:
    """The type in which a parameter's update is computed."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def scalars_of(rule: Rule, hyper: Sequence[float], dtype: torch.dtype, first: bool) -> list[float]:
    """The rule's scalars, derived in float64 and rounded once to ``dtype``."""
    derived = rule.derive(*map(float, hyper), float(first))
    if dtype == torch.float64:
        return [float(value) for value in derived]
    return [ctypes.c_float(value).value for value in derived]


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def update(
    rule: Rule,
    param: torch.Tensor,
    grad: torch.Tensor,
    states: Sequence[torch.Tensor | None],
    hyper: Sequence[float],
    *,
    grad_multiplier: float = 1.0,
    first: bool = False,
) -> None:
    """Update one parameter and its states in place; ``grad`` is left as it is.

    ``hyper`` are the rule's hyper-parameters in its order; a state of None is absent: it reads as
    zero and is not written. ``first`` says that this is the parameter's first step.
    """
    dtype = compute_dtype(param)
    scalars = scalars_of(rule, hyper, dtype, first)
    p = _real(param).to(dtype)
    g = _real(grad).to(dtype) * grad_multiplier
    loaded = [torch.zeros_like(p) if s is None else _real(s).to(dtype) for s in states]
    new_p, *new_states = rule.update(p, g, *loaded, *scalars)
    _real(param).copy_(new_p)
    for state, new_state in zip(states, new_states, strict=True):
        if state is not None:
            _real(state).copy_(new_state)

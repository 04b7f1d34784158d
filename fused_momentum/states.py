"""What an optimizer keeps per parameter: tensors of its shape, numbers, a count of its steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import flat, reference, shards
from .rules import STEP, Kept, Rule


def state_dtype(param: torch.Tensor, requested: torch.dtype | None) -> torch.dtype:
    """The type of a parameter's states: float32 by default, float64 over float64."""
    if param.is_complex():
        return param.dtype
    return requested or reference.compute_dtype(param)


def names_of(rule: Rule) -> list[str]:
    """Everything that the rule may keep for a parameter."""
    counted = [STEP] if rule.read is not None else []
    return [s.name for s in (*rule.states, *rule.kept)] + counted


@torch.inference_mode(False)
def make_states(
    rule: Rule,
    lacking: Iterable[tuple[torch.Tensor, str]],
    state: dict,
    dtype: torch.dtype | None,
) -> None:
    """Add to ``state`` what these (parameter, name) lack, as it is before the first step.

    All tensors of one device and type lie in one flat buffer, and so do all numbers. The state of a
    sharded parameter is sharded as it is.
    """
    members: dict[str, list[torch.Tensor]] = {}
    for param, name in lacking:
        members.setdefault(name, []).append(param)
    tensors = [(s.name, p) for s in rule.states for p in members.get(s.name, ())]
    dtypes = [state_dtype(p, dtype) for _, p in tensors]
    made = flat.zeros_like([shards.part_of(p) for _, p in tensors], dtypes, own_storage=True)
    for (name, param), tensor in zip(tensors, made, strict=True):
        state.setdefault(param, {})[name] = shards.like(param, tensor)
    for kept in rule.kept:
        params = members.get(kept.name, [])
        for param, number in zip(params, _numbers(kept, params), strict=True):
            state.setdefault(param, {})[kept.name] = number
    for param in members.get(STEP, ()):
        state.setdefault(param, {})[STEP] = torch.zeros((), dtype=torch.float32, device="cpu")


def _numbers(kept: Kept, params: list[torch.Tensor]) -> list[torch.Tensor]:
    devices = [p.device for p in params]
    dtype = getattr(torch, kept.dtype)
    made = {device: iter(flat.numbers(devices.count(device), dtype, device, kept.initial))
            for device in dict.fromkeys(devices)}  # fmt: skip
    return [next(made[device]) for device in devices]

"""The states of a checkpoint: checked, shielded from torch's cast, copied into flat buffers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from .. import shards
from ..checks import check_is_there
from ..rules import STEP, Rule
from ..states import make_states, names_of


class _Shell:
    """Carries a tensor through torch's load_state_dict, which would cast it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def shielded(rule: Rule, state_dict: dict[str, Any], params: list[torch.Tensor]) -> dict[str, Any]:
    """A state_dict for these parameters, its states checked and each tensor of them in a shell."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    param_of = dict(zip(saved, params, strict=False))
    states = dict(state_dict["state"])
    for i, values in states.items():
        if i in param_of and isinstance(values, dict):
            states[i] = _shielded(rule, i, values, param_of[i])
    _check_names(rule, states, state_dict["param_groups"])
    return {**state_dict, "state": states}


def _shielded(rule: Rule, i: int, values: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
    tensors = {state.name for state in rule.states}
    values = {key: value for key, value in values.items() if value is not None}
    for name in [name for name in names_of(rule) if name in values]:
        value, what = values[name], f"state_dict: {name} of parameter {i}"
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{what} is a {type(value).__name__}; needed: a tensor")
        if value.layout != torch.strided:
            raise TypeError(f"{what} has layout {value.layout}; needed: torch.strided")
        if shards.is_sharded(value) and not (
            shards.is_sharded(param) and value.device_mesh == param.device_mesh
        ):
            raise ValueError(
                f"{what} is sharded over {value.device_mesh}; needed: a whole tensor, or one that "
                "is sharded over its parameter's mesh"
            )
        shape = param.shape if name in tensors else torch.Size()
        if value.shape != shape and not (name not in tensors and value.numel() == 1):
            raise ValueError(f"{what} has shape {list(value.shape)}; needed: {list(shape)}")
        if value.is_meta:
            raise ValueError(f"{what} is on device meta, where there is nothing to load")
        if value.is_complex() and not param.is_complex():
            raise TypeError(f"{what} is complex; needed: real numbers, as its parameter has")
        check_is_there(what, shards.part_of(value))
        values[name] = _Shell(value)
    return values


def _check_names(rule: Rule, states: dict[int, Any], groups: list[dict[str, Any]]) -> None:
    """Raise where there are states, and none is of this rule: they are another optimizer's.

    What users keep beside them is let through, and may be all that there is with momentum 0.
    """
    names = names_of(rule)
    own = {*names} - {STEP}  # which others count as well
    held = {i: {*values} for i, values in states.items() if isinstance(values, dict) and values}
    if any(keys & own or keys == {STEP} & {*names} for keys in held.values()):
        return
    for group in groups:
        if all(s.when and group.get(s.when) == 0 for s in (*rule.states, *rule.kept)):
            continue
        for i in held.keys() & set(group["params"]):
            raise ValueError(
                f"state_dict: state of parameter {i} has {sorted(held[i])}; needed: {names}"
            )


@torch.no_grad()
def rehomed(
    rule: Rule,
    states: dict,
    groups: list[dict[str, Any]],
    dtype: torch.dtype | None,
    complete: Callable[[dict[str, torch.Tensor], dict[str, Any]], None],
) -> dict:
    """Copies of all states, in new flat buffers; for loading, unpickling and deepcopy.

    ``complete(held, group)`` adds what another implementation's checkpoint lacks of a parameter's.
    """
    names = names_of(rule)
    ours = {param for group in groups for param in group["params"]}
    made: dict = defaultdict(dict)
    for param, values in states.items():
        if param in ours:
            values = {key: value for key, value in values.items() if key not in names}
        made[param] = values
    found = []
    for group in groups:
        for param in group["params"]:
            values = states.get(param, {})
            held = {
                name: value.tensor if isinstance(value, _Shell) else value
                for name in names
                if (value := values.get(name)) is not None
            }
            complete(held, group)
            found += [(param, name, tensor) for name, tensor in held.items()]
    make_states(rule, [(param, name) for param, name, _ in found], made, dtype)
    for param, name, tensor in found:
        state = made[param][name]
        state.copy_(shards.spread(tensor.reshape(state.shape), state))
    return made

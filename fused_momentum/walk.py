"""The walk over parameters, gradients and states in Python, afresh at each step.

The twin of the extension's ``Plan`` (``csrc/plan.h``), for the reference, and for Triton where
there is no extension. Same methods, same errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import reference
from .checks import check_param, check_tensor, number_of
from .rules import Rule


class Todo(NamedTuple):
    """What must be done before a step can be; see ``Plan::Todo`` in ``csrc/plan.h``."""

    missing: list[int]
    devices: list[str]


class Item(NamedTuple):
    """One tensor that takes part: its parameter, states (None: absent), and row of the group."""

    param: torch.Tensor
    states: list[torch.Tensor | None]
    row: int
    first: bool


def needed_states(rule: Rule, group: dict) -> list[str]:
    """Names of the states that the rule keeps with this group's hyper-parameters."""
    return [s.name for s in rule.states if s.when is None or group[s.when] != 0]


class Walk:
    """What one step of ``rule`` works on, among the tensors on one kind of device."""

    def __init__(self, rule: Rule, device_type: str):
        self.moves = 0  # addresses are not compared: every walk may have found new ones
        self._rule = rule
        self._device_type = device_type
        self._left: set[str] = set()
        self._items: list[Item] = []
        self._params: list[tuple[torch.Tensor, int]] = []
        self._hyper: list[list[float]] = []

    def leave(self, device_type: str) -> None:
        """Tensors on this kind of device are taken care of elsewhere."""
        self._left.add(device_type)

    def at(self, position: int) -> tuple[torch.Tensor, int]:
        """The parameter at a position of ``Todo.missing``, and the index of its group."""
        return self._params[position]

    def read(
        self,
        groups: list[dict],
        state: dict,
        params: Sequence[torch.Tensor] | None,
        grad_multiplier: float,
        first: Sequence[int],
    ) -> Todo | None:
        """Find what this step works on; see ``Plan::read`` in ``csrc/plan.h``."""
        self.moves += 1
        self._params = [(p, i) for i, group in enumerate(groups) for p in group["params"]]
        self._hyper = [
            [
                *(number_of(group, key) for key in self._rule.hyper),
                -grad_multiplier if number_of(group, "maximize") else grad_multiplier,
            ]
            for group in groups
        ]
        self._items = []
        todo = Todo([], [])
        begin = {i: k for k, (_, i) in reversed(list(enumerate(self._params)))}
        for position in self._chosen(params):
            param, row = self._params[position]
            name = f"param_groups[{row}]['params'][{position - begin[row]}]"
            if isinstance(param, torch.Tensor) and param.grad is None:
                continue
            check_param(name, param)
            if param.device.type != self._device_type:
                if param.device.type not in {*self._left, *todo.devices}:
                    todo.devices.append(param.device.type)
                continue
            check_tensor(f"{name}.grad", param.grad, param)
            kept, needed = state.get(param, {}), needed_states(self._rule, groups[row])
            states = [kept.get(s.name) if s.name in needed else None for s in self._rule.states]
            for tensor in states:
                if tensor is not None:
                    check_tensor(f"{name} state", tensor, param)
            if any(kept.get(key) is None for key in needed):
                todo.missing.append(position)
            self._items.append(Item(param, states, row, position in first))
        return todo if todo.missing or todo.devices else None

    def _chosen(self, params: Sequence[torch.Tensor] | None) -> Sequence[int]:
        if params is None:
            return range(len(self._params))
        position_of = {id(p): k for k, (p, _) in enumerate(self._params)}
        positions: list[int] = []
        for k, param in enumerate(params):
            position = position_of.get(id(param))
            if position is None:
                raise ValueError(f"params[{k}] is not a parameter of this optimizer")
            if position in positions:
                raise ValueError(f"params[{k}] is given twice")
            positions.append(position)
        return positions

    @torch.no_grad()
    def run(self) -> None:
        """Take the step, on the reference."""
        for param, states, row, first in self._items:
            *hyper, grad_multiplier = self._hyper[row]
            reference.update(
                self._rule,
                param,
                param.grad,
                states,
                hyper,
                grad_multiplier=grad_multiplier,
                first=first,
            )

    def batches(self) -> list:
        """The step as tables, for a back-end that is launched from Python."""
        from . import kernels

        return kernels.batches(
            [
                kernels.Item((param, param.grad, *states), row, (float(first),))
                for param, states, row, first in self._items
            ]
        )

    def hyper(self) -> torch.Tensor:
        """float64 [rows, k + 1]: each group's hyper-parameters, then its gradient multiplier."""
        return torch.tensor(self._hyper, dtype=torch.float64)

    def finish(self) -> None:
        """The tables were launched: the version counters of the parameters move."""
        torch.autograd.graph.increment_version([item.param for item in self._items])

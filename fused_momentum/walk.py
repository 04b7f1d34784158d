"""The walk over parameters, gradients and states in Python, afresh at each step.

The twin of the extension's ``Plan`` (``csrc/plan.h``), for the reference, and for Triton where
there is no extension. Same methods, same errors.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from . import reference, shards
from .checks import (
    check_is_tensor,
    check_memory,
    check_number,
    check_param,
    check_tensor,
    number_of,
)
from .rules import STEP, Kept, Rule, State


class Todo(NamedTuple):
    """What must be done before a step can be; see ``Plan::Todo`` in ``csrc/plan.h``."""

    missing: list[int]
    devices: list[str]


class Item(NamedTuple):
    """One tensor that takes part: its states and kept numbers (None: absent), row of the table.

    Of a sharded parameter, its gradient and its states it has the parts that are here.
    """

    position: int
    param: torch.Tensor
    grad: torch.Tensor
    states: list[torch.Tensor | None]
    kept: list[torch.Tensor | None]
    step: torch.Tensor | None  # how many steps it has taken, for a rule that depends on it
    row: int
    first: bool = False


def hyper_of(rule: Rule, group: dict, t: int = 1) -> list[float]:
    """The rule's hyper-parameters for a tensor of the group that takes its step ``t``."""
    if rule.read is not None:
        return [float(value) for value in rule.read(group, t)]
    return [number_of(group, key, rule.choices.get(key, ())) for key in rule.hyper]


def needed(rule: Rule, hyper: Sequence[float]) -> list[State | Kept]:
    """The states and kept numbers that the rule needs with these hyper-parameters."""
    return [
        s
        for s in (*rule.states, *rule.kept)
        if s.when is None or hyper[rule.hyper.index(s.when)] != 0
    ]


class Walk:
    """What one step of ``rule`` works on, among the tensors on one kind of device."""

    def __init__(self, rule: Rule, device_type: str, moved: shards.Moved | None = None):
        self._moved = {} if moved is None else moved
        # Addresses are not compared: every walk may have found new ones.
        self.moves = self.generation = 0
        self._rule = rule
        self._device_type = device_type
        self._left: set[str] = set()
        self._items: list[Item] = []
        self._updates: dict[int, reference.Update] = {}  # measured already, by position
        # By position: the kept numbers of what was measured, held so that no new tensor gets their
        # identity.
        self._settled: dict[int, list[torch.Tensor | None]] = {}
        self._params: list[tuple[torch.Tensor, int]] = []
        self._rows: dict[tuple[int, int], int] = {}  # of a group, at a step of a tensor
        self._hyper: list[list[float]] = []
        self._device_lr: list[int] = []  # by row
        self._keeps_lr = False

    def keep_lr_on_device(self) -> None:
        """The back-end reads learning rates of capturable groups on the device."""
        self._keeps_lr = True

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
        self.moves = self.generation = self.moves + 1
        self._params, names = [], []
        for i, group in enumerate(groups):
            for k, param in enumerate(group["params"]):
                names.append(f"param_groups[{i}]['params'][{k}]")
                check_is_tensor(names[-1], param)
                self._params.append((param, i))
        self._items, self._updates, self._rows, self._hyper = [], {}, {}, []
        self._device_lr = []
        if self._rule.read is None:
            for i in range(len(groups)):
                self._row_of(groups, i, 1, grad_multiplier)
        todo = Todo([], [])
        for position in self._chosen(params):
            param, _ = self._params[position]
            if param.grad is None:
                continue
            name = names[position]
            part = shards.part_of(param)
            check_param(name, part)
            if part.device.type == self._device_type:
                held = state.get(param, {})
                item = self._read_entry(position, name, groups, held, grad_multiplier, todo)
                self._items.append(item._replace(first=position in first))
            elif part.device.type not in {*self._left, *todo.devices}:
                todo.devices.append(part.device.type)
        return todo if todo.missing or todo.devices else None

    def _read_entry(
        self,
        position: int,
        name: str,
        groups: list[dict],
        held: dict,
        grad_multiplier: float,
        todo: Todo,
    ) -> Item:
        """Read one tensor that takes part, and what is held of its states."""
        param, i = self._params[position]
        step = held.get(STEP) if self._rule.read is not None else None
        if step is not None:
            check_number(name, STEP, step, "float32", torch.device("cpu"))
            if not (step.isfinite() and step >= 0):
                raise ValueError(
                    f"{name}: its state {STEP!r} is {step.item():g}; needed: a number of steps"
                )
        held = {key: value for key, value in held.items() if isinstance(value, torch.Tensor)}
        row = self._row_of(groups, i, 1 if step is None else int(step) + 1, grad_multiplier)
        names = [s.name for s in needed(self._rule, self._hyper[row])]
        states = [held.get(s.name) if s.name in names else None for s in self._rule.states]
        kept = [held.get(k.name) if k.name in names else None for k in self._rule.kept]
        part, grad, *states = shards.parts_of(name, (param, param.grad, *states), self._moved)
        check_tensor(f"{name}.grad", grad, part)
        check_memory(f"{name}.grad", grad, part, written=False)
        for tensor in states:
            if tensor is not None:
                check_tensor(f"{name} state", tensor, part)
                check_memory(f"{name} state", tensor, part, written=True)
        for k, number in zip(self._rule.kept, kept, strict=True):
            if number is not None:
                check_number(name, k.name, number, k.dtype, part.device)
        if self._rule.read is not None:
            names.append(STEP)
        if any(held.get(key) is None for key in names):
            todo.missing.append(position)
        return Item(position, part, grad, states, kept, step, row)

    def abandon(self) -> None:
        """What was read is no longer needed; it would keep gradients alive."""
        self._items, self._updates = [], {}

    def _row_of(self, groups: list[dict], i: int, t: int, grad_multiplier: float) -> int:
        """The row of the table for tensors of group ``i`` that take their step ``t``."""
        if self._rule.read is None:
            t = 1
        if (i, t) not in self._rows:
            self._rows[i, t] = len(self._hyper)
            maximize = number_of(groups[i], "maximize")
            address = self._address_of_lr(groups[i])
            self._device_lr.append(address)
            # Reading it here would wait for the device.
            hyper = hyper_of(self._rule, {**groups[i], "lr": 0.0} if address else groups[i], t)
            self._hyper.append([*hyper, -grad_multiplier if maximize else grad_multiplier])
        return self._rows[i, t]

    def _address_of_lr(self, group: dict) -> int:
        """A learning rate's entry in ``device_lr``; as Plan::read_device_lr in csrc/rows.cpp."""
        lr = group.get("lr")
        stays = (
            self._keeps_lr
            and self._rule.read is None
            and isinstance(lr, torch.Tensor)
            and lr.device.type == self._device_type
            and lr.dtype in (torch.float32, torch.float64)
            and lr.numel() == 1
            and number_of(group, "capturable") != 0
            and all(param.device == lr.device for param in group["params"])
        )
        return lr.data_ptr() + (lr.dtype == torch.float64) if stays else 0

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

    def measures(self) -> bool:
        """Whether a tensor of this step may have something to measure."""
        measure = self._rule.measure
        if measure.settles:
            return bool(self.unsettled())
        initial = [kept.initial for kept in self._rule.kept]
        return any(not measure.settled(*hyper[:-1], *initial) for hyper in self._hyper)

    def unsettled(self) -> list[int]:
        """Positions of the tensors of this step that may have something to measure."""
        return [
            item.position
            for item in self._items
            if item.param.numel() and not self._is_settled(item)
        ]

    def unsettled_shards(self) -> list[int]:
        """As ``unsettled``, of sharded parameters: what is to be measured is not here alone."""
        return [item.position for item in self._sharded() if not self._is_settled(item)]

    def _sharded(self) -> list[Item]:
        return [item for item in self._items if shards.is_sharded(self._params[item.position][0])]

    def _is_settled(self, item: Item) -> bool:
        held = self._settled.get(item.position)
        return held is not None and all(map(operator.is_, held, item.kept))

    def settle(self, position: int, kept: Sequence[torch.Tensor | None]) -> None:
        """The tensor here has nothing left to measure while these are its kept numbers."""
        self._settled[position] = list(kept)

    def kept(self, position: int) -> tuple[list[torch.Tensor | None], list[float]]:
        """The kept numbers of a tensor of this step, and its hyper-parameters."""
        item = next(item for item in self._items if item.position == position)
        return item.kept, self._hyper[item.row][:-1]

    @torch.no_grad()
    def measure(self, updates: bool) -> None:
        """Run the pass before the update, on the reference; ``updates``: ``run`` follows."""
        with self._writing():
            for item in self._items:
                update = self._updates[item.position] = self._update_of(item)
                if not update.settled():
                    update.measure(updates)

    @torch.no_grad()
    def run(self) -> None:
        """Take the step, on the reference."""
        with self._writing():
            for item in self._items:
                (self._updates.get(item.position) or self._update_of(item)).update()
            self._count([])

    def _writing(self) -> AbstractContextManager:
        """The mode in which torch lets everything be written that is."""
        written = (t for i in self._items for t in (i.param, *i.states, *i.kept, i.step))
        inference = any(t is not None and t.is_inference() for t in written)
        return torch.inference_mode() if inference else nullcontext()

    def _update_of(self, item: Item) -> reference.Update:
        *hyper, grad_multiplier = self._hyper[item.row]
        return reference.Update(
            self._rule,
            item.param,
            item.grad,
            item.states,
            item.kept,
            hyper,
            grad_multiplier=grad_multiplier,
            first=item.first,
        )

    def batches(self) -> list:
        """The step as tables, for a back-end that is launched from Python."""
        from . import kernels

        return kernels.batches(
            [
                kernels.Item(
                    (item.param, item.grad, *item.states),
                    item.row,
                    (float(item.first), *(0.0 for _ in self._rule.tensor_scalars[1:])),
                    item.kept,
                )
                for item in self._items
            ]
        )

    def hyper(self) -> torch.Tensor:
        """float64 [rows, k + 1]: hyper-parameters, then the gradient multiplier."""
        return torch.tensor(self._hyper, dtype=torch.float64, device="cpu")

    def device_lr(self) -> torch.Tensor | None:
        """int64 [rows]: where learning rates are on the device; see ``csrc/plan.h``."""
        return torch.tensor(self._device_lr, device="cpu") if any(self._device_lr) else None

    def finish(self) -> None:
        """The tables were launched: version counters of the parameters move, and step counts."""
        self._count([item.param for item in self._items])

    def _count(self, launched: list[torch.Tensor]) -> None:
        """Move the version counters of these, and of what their parts are of; count the step."""
        whole = [self._params[item.position][0] for item in self._sharded()]
        torch.autograd.graph.increment_version(launched + whole)
        for item in self._items:
            if item.step is not None:
                item.step.add_(1)

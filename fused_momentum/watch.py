"""Which tensors have been measured, found out without waiting for a device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .graphs import is_capturing
from .rules import Rule


class Question(NamedTuple):
    """Kept numbers of one device that are on their way to the host."""

    device: torch.device
    arrived: torch.cuda.Event | None  # None: they are there
    positions: list[int]
    kept: list[list[torch.Tensor | None]]
    hyper: list[list[float]]
    numbers: torch.Tensor  # float64 [positions, kept numbers]

    def is_answered(self) -> bool:
        """Whether the numbers are on the host; while a graph is captured nobody may ask."""
        return self.arrived is None or (not is_capturing(self.device) and self.arrived.query())


class Watch:
    """Finds out, without waiting for a device, which tensors have nothing left to measure."""

    def __init__(self, rule: Rule, walk: Any):
        self._rule, self._walk = rule, walk
        self._questions: list[Question] = []

    def measures(self) -> bool:
        """Whether a tensor of this step may have something to measure, as far as is known."""
        waiting = []
        for q in self._questions:
            if not q.is_answered():
                waiting.append(q)
                continue
            rows = zip(q.positions, q.kept, q.hyper, q.numbers.tolist(), strict=True)
            for position, kept, hyper, row in rows:
                if self._rule.measure.settled(*hyper, *row):
                    self._walk.settle(position, kept)
        self._questions = waiting
        return self._walk.measures()

    @torch.no_grad()
    def ask(self) -> None:
        """Have the kept numbers, which a measuring step is about to write, sent to the host."""
        asked = {
            (position, *map(id, kept))
            for question in self._questions
            for position, kept in zip(question.positions, question.kept, strict=True)
        }
        members: dict[torch.device, list[int]] = {}
        for position in self._walk.unsettled():
            kept, _ = self._walk.kept(position)
            if (position, *map(id, kept)) not in asked:
                device = next(tensor.device for tensor in kept if tensor is not None)
                members.setdefault(device, []).append(position)
        for device, positions in members.items():
            if not is_capturing(device):  # what is captured runs later, and at every replay
                self._questions.append(self._question(device, positions))

    def _question(self, device: torch.device, positions: list[int]) -> Question:
        kept, hyper = map(list, zip(*map(self._walk.kept, positions), strict=True))
        columns = []
        for k, number in enumerate(self._rule.kept):
            given = [row[k] for row in kept]
            initial = torch.full((), number.initial, dtype=torch.float64, device=device)
            given = [initial if t is None else t.double().reshape(()) for t in given]
            columns.append(torch.stack(given))
        numbers, arrived = torch.stack(columns, 1), None
        if device.type == "cuda":
            numbers = numbers.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(device))
        return Question(device, arrived, positions, kept, hyper, numbers)

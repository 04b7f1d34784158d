"""One step: which back-end takes which tensors, the states they need, what runs in which order.

The walk over parameters, gradients and states is the extension's (``csrc/plan.cpp``), cached from
step to step; the reference, and Triton where there is no extension, walk in Python (``walk.py``).
"""

from __future__ import annotations

import ctypes
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from . import collective, native, shards
from .backends import PREFERENCE, choose
from .rules import STEP, Rule, State
from .states import make_states
from .walk import Walk, hyper_of, needed
from .watch import Watch


class Amp(NamedTuple):
    """What ``torch.amp.GradScaler`` has left to the step: its scale and whether it found an inf."""

    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    def skips(self) -> bool:
        """Whether the step must be skipped; waits for the device."""
        return self.found_inf is not None and self.found_inf.item() != 0

    def grad_multiplier(self) -> float:
        """1 / scale, rounded to float32 as GradScaler.unscale_ does; waits for the device."""
        if self.grad_scale is None:
            return 1.0
        scale = self.grad_scale.item()
        return ctypes.c_float(1.0 / scale if scale else math.inf).value


NO_AMP = Amp()


class _Walked:
    """The passes of a walk that runs them itself, on the CPU."""

    def measure(self, walk: Any, updates: bool, amp: Amp) -> None:
        walk.measure(updates)

    def run(self, walk: Any, amp: Amp) -> None:
        walk.run()


class _Cuda:
    """The passes on the CUDA kernels, on torch's current streams."""

    def measure(self, walk: Any, updates: bool, amp: Amp) -> None:
        stream = torch._C._cuda_getCurrentRawStream
        walk.measure_cuda(stream, updates, amp.grad_scale, amp.found_inf)

    def run(self, walk: Any, amp: Amp) -> None:
        walk.run_cuda(torch._C._cuda_getCurrentRawStream, amp.grad_scale, amp.found_inf)


class _Triton:
    """The passes on the Triton kernels, on torch's current streams."""

    def __init__(self, rule: Rule):
        from . import kernels

        self._launcher = kernels.Launcher(rule)

    def measure(self, walk: Any, updates: bool, amp: Amp) -> None:
        self._launcher.measure(walk.batches(), walk.hyper(), updates, walk.device_lr(), *amp)

    def run(self, walk: Any, amp: Amp) -> None:
        self._launcher.run(walk.batches(), walk.hyper(), walk.device_lr(), *amp)
        walk.finish()


class Plan:
    """Runs the steps of ``rule`` with the back-end ``request`` (a name, or "auto")."""

    def __init__(self, rule: Rule, request: str, dtype: torch.dtype | None):
        self.rule = rule
        self._request = request
        self._dtype = dtype
        self._walks: dict[str, Any] = {}  # by kind of device
        self._runners: dict[str, _Walked | _Cuda | _Triton] = {}
        self._watches: dict[str, Watch] = {}
        # Whether every back-end reads what the GradScaler says on the device, in a step without
        # first steps; else the host must wait for it.
        self._reads_amp = False
        self._settled = False
        self._moved: shards.Moved = {}
        self._alone: Any = None  # the walk that takes whole steps, where there is one

    def _take(self, device_type: str, groups: list[dict]) -> None:
        """Choose the back-end for one kind of device, and make its walk."""
        if device_type == "meta":
            _refuse_meta(groups)
        name, reason = choose(self._request, device_type)
        if name == "reference" and self._request == "auto" and device_type in PREFERENCE:
            warnings.warn(
                f"fused_momentum: {device_type} tensors are updated by plain torch, slower than by "
                f"torch.optim.SGD ({reason}); backend='reference' asks for it without this warning",
                RuntimeWarning,
                stacklevel=2,
            )
        walk = self._make_walk(name, device_type)
        if name in ("cuda", "triton"):
            walk.keep_lr_on_device()
        for other, other_walk in self._walks.items():
            walk.leave(other)
            other_walk.leave(device_type)
        self._walks[device_type] = walk
        self._watches[device_type] = Watch(self.rule, walk)
        runners = {"cuda": _Cuda, "triton": lambda: _Triton(self.rule)}
        self._runners[device_type] = runners.get(name, _Walked)()
        self._alone = self._walk_alone(name)
        # Steps are counted on the host: it must know whether this is one.
        self._reads_amp = self.rule.read is None and not any(
            isinstance(runner, _Walked) for runner in self._runners.values()
        )

    def _walk_alone(self, name: str) -> Any:
        """The walk, where it is the only one, and the extension's on the CPU."""
        return self._walks["cpu"] if name == "cpu" and len(self._walks) == 1 else None

    def _make_walk(self, name: str, device_type: str) -> Any:
        extension, _ = native.load()
        if name == "reference" or extension is None:
            return Walk(self.rule, device_type, self._moved)
        keys = [
            extension.StateKey(s.name, -1 if s.when is None else self.rule.hyper.index(s.when))
            for s in (*self.rule.states, *self.rule.kept)
        ]
        index = native.rule_number(self.rule.name)
        choices = [list(self.rule.choices.get(key, ())) for key in self.rule.hyper]
        walk = extension.Plan(index, self.rule.hyper, choices, keys, device_type)
        walk.read_parts_with(partial(shards.parts_of, moved=self._moved))
        if self.rule.read is not None:
            walk.read_rows_with(self.rule.read)
        return walk

    @property
    def moves(self) -> int:
        """Changes at least when a parameter was found at another address."""
        return sum(walk.moves for walk in self._walks.values())

    @property
    def generation(self) -> int:
        """Changes at least when a parameter, gradient or state was found at another address."""
        return sum(walk.generation for walk in self._walks.values())

    @property
    def bytes(self) -> int:
        """Bytes that the extension's walks hold."""
        return sum(walk.bytes() for walk in self._walks.values())

    def step(
        self,
        groups: list[dict],
        state: dict,
        params: Sequence[torch.Tensor] | None,
        amp: Amp,
        updates: bool = True,
        on_measured: Callable[[], None] | None = None,
    ) -> bool:
        """Update every parameter with a gradient, or those of ``params``; all of it or nothing.

        Returns False where ``amp`` says that the step must be skipped, as far as that is known
        without waiting for a device. ``updates=False`` only measures. A step that measures, or has
        made states, calls ``on_measured`` before the update.
        """
        self._moved.clear()  # a step that raised may have left some
        if self.rule.read is not None and torch.cuda.is_initialized():
            _refuse_capture(self.rule)
        waits = amp is not NO_AMP and not (self._reads_amp and self._settled)
        if waits and amp.skips():
            return False
        if not self._walks:
            for device_type in _device_types(groups):
                self._take(device_type, groups)
        grad_multiplier = amp.grad_multiplier() if waits else 1.0
        # torch takes any sequence for one.
        groups = groups if type(groups) is list else list(groups)
        alone = self._alone if updates else None
        if alone is not None and alone.step(groups, state, params, grad_multiplier):
            self._moved.clear()
            return True
        made: list[tuple[torch.Tensor, str]] = []
        stepped: set[str] = set()
        read = partial(self._read, groups, state, params, grad_multiplier)
        try:
            if not self._prepare(groups, state, read, amp, waits, updates, made, on_measured):
                return False
            for device_type, walk in self._walks.items() if updates else ():
                self._runners[device_type].run(walk, NO_AMP if waits else amp)
                stepped.add(device_type)
        except BaseException:
            # Who has not begun must begin with the next attempt.
            for param, name in made:
                if param.device.type not in stepped:
                    _drop(state, param, name)
            raise
        finally:
            self._moved.clear()
            for walk in self._walks.values():
                walk.abandon()
        return True

    def _prepare(
        self, groups, state, read: Callable, amp: Amp, waits: bool, updates: bool, made, on_measured
    ) -> bool:
        """Make the states that are lacking, and measure; return False where the step is skipped."""
        first: dict[str, list[int]] = {}
        todo = read(first)
        if self.rule.measure is not None and not self.rule.measure.settles:
            self._refuse_shards(groups)
        if todo:
            if not waits and amp.skips():
                return False
            for device_type, found in todo.items():
                at = self._walks[device_type].at
                lacking = [(param, groups[i]) for param, i in map(at, found.missing)]
                begin = self.make_states(lacking, state, made)
                first[device_type] = list(itertools.compress(found.missing, begin))
            for device_type, found in read(first).items():
                name = _name_of(groups, *self._walks[device_type].at(found.missing[0]))
                raise RuntimeError(f"{name} lost its state while the step was prepared")
        self._settled = not made
        if self.rule.measure is not None:
            measured = self._settle_shards(groups, updates, amp, first)
            if measured:
                read(first)
            self._measure(updates, NO_AMP if waits else amp, measured or bool(made), on_measured)
        return True

    def make_states(
        self,
        tensors: list[tuple[torch.Tensor, dict]],
        state: dict,
        made: list[tuple[torch.Tensor, str]],
    ) -> list[bool]:
        """Make what these parameters, each with its group, lack; whether each has yet to begin.

        One that has its states, and lacks only numbers, has begun. Adds (parameter, name) of what
        was made to ``made``.
        """
        lacking, begin = [], []
        for param, group in tensors:
            entries = needed(self.rule, hyper_of(self.rule, group))
            held = state.get(param, {})
            lacks = [s for s in entries if not isinstance(held.get(s.name), torch.Tensor)]
            measure = self.rule.measure
            # Where that which is measured once is lacking, the other numbers say nothing about it.
            if measure is not None and measure.settles and self.rule.kept[0] in lacks:
                lacks = [s for s in entries if s in lacks or not isinstance(s, State)]
            begin.append(len(lacks) == len(entries) or any(isinstance(s, State) for s in lacks))
            lacking += [(param, s.name) for s in lacks]
            if self.rule.read is not None and held.get(STEP) is None:
                lacking.append((param, STEP))
        made += lacking
        make_states(self.rule, lacking, state, self._dtype)
        return begin

    def _refuse_shards(self, groups: list[dict]) -> None:
        """Raise where each step measures a sharded tensor: the kernels see no more than a part."""
        initial = [kept.initial for kept in self.rule.kept]
        for walk in self._walks.values():
            for position in walk.unsettled_shards():
                if self.rule.measure.settled(*walk.kept(position)[1], *initial):
                    continue
                name = _name_of(groups, *walk.at(position))
                raise TypeError(
                    f"{name} is a DTensor, of which a part is here; {self.rule.name} with "
                    "these settings measures whole tensors at each step: needed is a plain tensor"
                )

    def _settle_shards(
        self, groups: list[dict], updates: bool, amp: Amp, first: dict[str, list[int]]
    ) -> bool:
        """Measure the sharded tensors that may have something to measure; whether there were any.

        Adds those that begin with this step to ``first``.
        """
        unsettled = {t: walk for t, walk in self._walks.items() if walk.unsettled_shards()}
        if not unsettled or amp.skips():
            return False
        for device_type, walk in unsettled.items():
            begin = collective.settle_shards(
                self.rule, walk, groups, self._moved, amp.grad_multiplier(), updates
            )
            first[device_type] = [*first.get(device_type, ()), *begin]
        return True

    def _measure(self, updates: bool, amp: Amp, measured: bool, on_measured) -> None:
        """Measure, on all devices, what this step's tensors may have left to measure."""
        devices = [t for t in self._walks if self._watches[t].measures()]
        for device_type in devices:
            self._runners[device_type].measure(self._walks[device_type], updates, amp)
        if (devices or measured) and on_measured is not None:
            on_measured()
        for device_type in devices if self.rule.measure.settles else ():
            self._watches[device_type].ask()

    def _read(self, groups, state, params, grad_multiplier, first) -> dict[str, Any]:
        """Bring every walk up to date; what they lack, by kind of device."""
        while True:
            lacking = {}
            for device_type, walk in self._walks.items():
                begin = first.get(device_type, ())
                if todo := walk.read(groups, state, params, grad_multiplier, begin):
                    lacking[device_type] = todo
            new = {other for todo in lacking.values() for other in todo.devices} if lacking else ()
            if not new:
                return lacking
            for device_type in sorted(new):
                self._take(device_type, groups)


def _drop(state: dict, param: torch.Tensor, name: str) -> None:
    held = state.get(param, {})
    held.pop(name, None)
    if not held:
        state.pop(param, None)


def _name_of(groups: list[dict], param: torch.Tensor, i: int) -> str:
    k = next(k for k, p in enumerate(groups[i]["params"]) if p is param)
    return f"param_groups[{i}]['params'][{k}]"


def _device_types(groups: list[dict]) -> list[str]:
    """Kinds of devices that have gradients; of all parameters where none has one."""
    params = [p for group in groups for p in group["params"]]
    found = {p.device.type for p in params if getattr(p, "grad", None) is not None}
    every = {getattr(p, "device", torch.device("cpu")).type for p in params} - {"meta"}
    return sorted(found or every) or ["cpu"]


def _refuse_capture(rule: Rule) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a step of {rule.name} cannot be captured in a CUDA graph: it depends on the number "
            "of the step, which is counted on the host, so every replay would repeat the step of "
            "the capture. Capture forward and backward, and call the optimizer's step after each "
            "replay"
        )


def _refuse_meta(groups: list[dict]) -> None:
    for i, group in enumerate(groups):
        for k, param in enumerate(group["params"]):
            if param.device.type == "meta" and param.grad is not None:
                raise RuntimeError(
                    f"param_groups[{i}]['params'][{k}] is on device meta, where there is no memory "
                    "to update; give the model some with to_empty() before the first step"
                )

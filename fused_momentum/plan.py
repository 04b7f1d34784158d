"""What one step works on: which back-end takes which tensors, and the states they need.

The walk over parameters, gradients and states is the extension's (``csrc/plan.cpp``), cached from
step to step; the reference, and Triton where there is no extension, walk in Python (``walk.py``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import flat, native, reference
from .backends import choose
from .rules import Rule
from .walk import Walk, needed_states


def state_dtype(param: torch.Tensor, requested: torch.dtype | None) -> torch.dtype:
    """The type of a parameter's states: float32 by default, float64 over float64."""
    if param.is_complex():
        return param.dtype
    return requested or reference.compute_dtype(param)


def make_states(
    rule: Rule,
    tensors: Sequence[tuple[torch.Tensor, dict]],
    state: dict,
    dtype: torch.dtype | None,
) -> None:
    """Add the states that these (parameter, group) lack to ``state``: zeros in new flat buffers."""
    missing = [
        (param, name)
        for param, group in tensors
        for name in needed_states(rule, group)
        if name not in state.get(param, ())
    ]
    params = [param for param, _ in missing]
    made = flat.zeros_like(params, [state_dtype(p, dtype) for p in params], own_storage=True)
    for (param, name), tensor in zip(missing, made, strict=True):
        state.setdefault(param, {})[name] = tensor


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
        return ctypes.c_float(1.0 / self.grad_scale.item()).value


def _launcher(name: str, rule: Rule) -> Callable[[Any, Amp], None] | None:
    """What runs a walk's step on a back-end that Python launches; None where the walk does."""
    if name == "cuda":
        return _launch_cuda
    if name != "triton":
        return None
    from . import kernels

    launcher = kernels.Launcher(rule)

    def launch(walk: Any, amp: Amp) -> None:
        launcher.run(walk.batches(), walk.hyper(), amp.grad_scale, amp.found_inf)
        walk.finish()

    return launch


def _launch_cuda(walk: Any, amp: Amp) -> None:
    walk.run_cuda(torch._C._cuda_getCurrentRawStream, amp.grad_scale, amp.found_inf)


class Plan:
    """Runs one step of ``rule`` with the back-end ``request`` (a name, or "auto")."""

    def __init__(self, rule: Rule, request: str, dtype: torch.dtype | None):
        self.rule = rule
        self._request = request
        self._dtype = dtype
        self._walks: dict[str, Any] = {}  # by kind of device
        self._launchers: dict[str, Any] = {}
        # Whether every back-end reads what the GradScaler says on the device, in a step without
        # first steps; else the host must wait for it.
        self._reads_amp = False
        self._settled = False

    def _take(self, device_type: str, groups: list[dict]) -> None:
        """Choose the back-end for one kind of device, and make its walk."""
        if device_type == "meta":
            _refuse_meta(groups)
        name = choose(self._request, device_type).name
        walk = self._make_walk(name, device_type)
        for other, other_walk in self._walks.items():
            walk.leave(other)
            other_walk.leave(device_type)
        self._walks[device_type] = walk
        self._launchers[device_type] = _launcher(name, self.rule)
        self._reads_amp = all(launcher is not None for launcher in self._launchers.values())

    def _make_walk(self, name: str, device_type: str) -> Any:
        extension, _ = native.load()
        if name == "reference" or extension is None:
            return Walk(self.rule, device_type)
        keys = [
            extension.StateKey(s.name, -1 if s.when is None else self.rule.hyper.index(s.when))
            for s in self.rule.states
        ]
        index = native.rule_index()[self.rule.name]
        walk = extension.Plan(index, self.rule.hyper, keys, device_type)
        if name == "cuda":
            walk.keep_lr_on_device()
        return walk

    @property
    def moves(self) -> int:
        """Changes at least when a parameter was found at another address."""
        return sum(walk.moves for walk in self._walks.values())

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
    ) -> bool:
        """Update every parameter with a gradient, or those of ``params``; all of it or nothing.

        Returns False where ``amp`` says that the step must be skipped, as far as that is known
        without waiting for a device.
        """
        waits = not (self._reads_amp and self._settled)
        if waits and amp.skips():
            return False
        if not self._walks:
            for device_type in _device_types(groups):
                self._take(device_type, groups)
        grad_multiplier = amp.grad_multiplier() if waits else 1.0
        first: dict[str, list[int]] = {}
        while todo := self._read(groups, state, params, grad_multiplier, first):
            if not waits and amp.skips():
                return False
            first = {device_type: found.missing for device_type, found in todo.items()}
            lacking = [self._walks[t].at(k) for t, missing in first.items() for k in missing]
            tensors = [(param, groups[row]) for param, row in lacking]
            make_states(self.rule, tensors, state, self._dtype)
        self._settled = not first
        for device_type, walk in self._walks.items():
            launch = self._launchers[device_type]
            if launch is None:
                walk.run()
            else:
                launch(walk, Amp() if waits else amp)
        return True

    def _read(self, groups, state, params, grad_multiplier, first) -> dict[str, Any]:
        """Bring every walk up to date; what they lack, by kind of device."""
        while True:
            found = {
                device_type: walk.read(
                    groups, state, params, grad_multiplier, first.get(device_type, ())
                )
                for device_type, walk in self._walks.items()
            }
            lacking = {device_type: todo for device_type, todo in found.items() if todo}
            new = {other for todo in lacking.values() for other in todo.devices}
            if not new:
                return lacking
            for device_type in sorted(new):
                self._take(device_type, groups)


def _device_types(groups: list[dict]) -> list[str]:
    """Kinds of devices with a gradient; the CPU where there is none, so that somebody looks."""
    params = [p for group in groups for p in group["params"]]
    found = {p.device.type for p in params if getattr(p, "grad", None) is not None}
    return sorted(found) or ["cpu"]


def _refuse_meta(groups: list[dict]) -> None:
    for i, group in enumerate(groups):
        for k, param in enumerate(group["params"]):
            if param.device.type == "meta" and param.grad is not None:
                raise RuntimeError(
                    f"param_groups[{i}]['params'][{k}] is on device meta, where there is no memory "
                    "to update; give the model some with to_empty() before the first step"
                )

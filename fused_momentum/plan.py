"""What one step works on: which back-end takes which tensors, and the states they need.

On tensors with a compiled back-end the walk over parameters, gradients and states is the
extension's (``csrc/plan.cpp``), cached between steps. The reference walks in Python, afresh at
each step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import flat, native, reference
from .backends import Choice, choose
from .rules import Rule

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)


class Item(NamedTuple):
    """One parameter that takes part in a step."""

    param: torch.Tensor
    group: dict
    hyper: Sequence[float] = ()


def state_dtype(param: torch.Tensor, requested: torch.dtype | None) -> torch.dtype:
    """The type of a parameter's states: float32 by default, float64 over float64."""
    if param.is_complex():
        return param.dtype
    return requested or reference.compute_dtype(param)


def needed_states(rule: Rule, group: dict) -> list[str]:
    """Names of the states that the rule keeps with this group's hyper-parameters."""
    return [s.name for s in rule.states if s.when is None or group[s.when] != 0]


def make_states(rule: Rule, items: Sequence[Item], state: dict, dtype: torch.dtype | None) -> None:
    """Add the states that are missing to ``state``: zeros, views of new flat buffers."""
    missing = [
        (item.param, name)
        for item in items
        for name in needed_states(rule, item.group)
        if name not in state.get(item.param, ())
    ]
    tensors = [param for param, _ in missing]
    made = flat.zeros_like(tensors, [state_dtype(p, dtype) for p in tensors], own_storage=True)
    for (param, name), tensor in zip(missing, made, strict=True):
        state.setdefault(param, {})[name] = tensor


def check_tensor(name: str, tensor: torch.Tensor, param: torch.Tensor) -> None:
    """Raise where a tensor cannot take part in the update of ``param``; as csrc/describe.cpp."""
    if tensor.is_sparse or tensor.layout in (torch.sparse_csr, torch.sparse_csc):
        raise RuntimeError(f"{name} is sparse; sparse gradients are not supported (make it dense)")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; needed: {', '.join(map(str, DTYPES))}")
    if tensor.device != param.device:
        raise ValueError(
            f"{name} is on device {tensor.device}, its parameter on {param.device}; "
            "both must be on the same device"
        )
    if tensor.shape != param.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, its parameter {list(param.shape)}; "
            "they must be the same"
        )
    if tensor.is_complex() != param.is_complex():
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, its parameter {param.dtype}; "
            "both must be real or both complex"
        )


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

    def on(self, device: torch.device) -> Amp:
        """The same tensors on ``device``."""
        return Amp(*(None if t is None else t.to(device, non_blocking=True) for t in self))


def check_param(name: str, param: object) -> None:
    """Raise where ``param`` cannot be updated; as csrc/plan.cpp and csrc/describe.cpp."""
    if not isinstance(param, torch.Tensor):
        raise TypeError(f"{name} is a {type(param).__name__}; needed: a tensor")
    check_tensor(name, param, param)
    if param.is_conj() or param.is_neg():
        raise TypeError(f"{name} is a lazily conjugated view; resolve it with .resolve_conj()")
    if any(param.shape[d] > 1 for d, stride in enumerate(param.stride()) if stride == 0):
        raise RuntimeError(
            f"{name} has elements that share memory (an expanded tensor); give it memory of its own"
        )


def number_of(group: dict, key: str) -> float:
    """The value of a hyper-parameter; as csrc/plan.cpp."""
    try:
        if isinstance(group[key], str):
            raise TypeError
        return float(group[key])
    except (TypeError, ValueError) as error:
        kind = type(group[key]).__name__
        raise TypeError(
            f"param_groups: {key} is a {kind}; needed: a number or a tensor with one element"
        ) from error


def _has_grad(param: object) -> bool:
    return getattr(param, "grad", None) is not None


def _refuse_meta(groups: list[dict]) -> None:
    for i, group in enumerate(groups):
        for k, param in enumerate(group["params"]):
            if _has_grad(param) and param.device.type == "meta":
                raise RuntimeError(
                    f"param_groups[{i}]['params'][{k}] is on device meta, where there is no memory "
                    "to update; give the model some with to_empty() before the first step"
                )


class Plan:
    """Runs one step of ``rule`` with the back-end ``request`` (a name, or "auto")."""

    def __init__(self, rule: Rule, request: str, dtype: torch.dtype | None):
        self.rule = rule
        self._request = request
        self._dtype = dtype
        self._choices: dict[str, Choice] = {}
        self._walks: dict[str, Any] = {}  # per kind of device, the extension's plan for it
        self._launchers: dict[str, Any] = {}  # per kind of device, where Python launches
        self._python_walks = 0
        self._settled = False
        self._uses_reference = False

    def _take(self, device_type: str, groups: list[dict]) -> None:
        """Choose the back-end for one kind of device, and make its walk."""
        if device_type in self._choices:
            return
        if device_type == "meta":
            _refuse_meta(groups)
        choice = self._choices[device_type] = choose(self._request, device_type)
        self._uses_reference |= choice.name == "reference"
        if choice.name != "reference":
            extension, _ = native.load()
            keys = [
                extension.StateKey(s.name, -1 if s.when is None else self.rule.hyper.index(s.when))
                for s in self.rule.states
            ]
            index = native.rule_index()[self.rule.name]
            walk = extension.Plan(index, self.rule.hyper, keys, device_type)
            for other in self._choices:
                walk.leave(other)
            self._walks[device_type] = walk
        for walk in self._walks.values():
            walk.leave(device_type)

    @property
    def moves(self) -> int:
        """Changes at least when a parameter was found at another address."""
        return self._python_walks + sum(walk.moves for walk in self._walks.values())

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
        if not self._choices:
            for device_type in {p.device.type for g in groups for p in g["params"] if _has_grad(p)}:
                self._take(device_type, groups)
        # A back-end that Python launches reads these on the device, once all first steps are done.
        waits = not self._settled or len(self._launchers) < len(self._choices)
        if waits and amp.skips():
            return False
        grad_multiplier = amp.grad_multiplier() if waits else 1.0
        work = self._reference_work(groups, state, params) if self._uses_reference else ()
        settled = True
        for walk in self._walks.values():
            first: list[int] = []
            while todo := walk.read(groups, state, params, grad_multiplier, first):
                if not waits and amp.skips():
                    return False
                for other in todo.devices:
                    self._take(other, groups)
                if todo.devices:
                    return self.step(groups, state, params, amp)
                items = [Item(param, groups[row]) for param, row in map(walk.at, todo.missing)]
                make_states(self.rule, items, state, self._dtype)
                first, settled = todo.missing, False
        for device_type, walk in self._walks.items():
            if device_type in self._launchers:
                self._launchers[device_type].run(walk, amp if not waits else Amp())
                walk.finish()
            else:
                walk.run()
        if work:
            self._run_reference(work, state, grad_multiplier)
        self._settled = settled
        return True

    def _reference_work(self, groups, state, params) -> list[Item]:
        """The checked tensors that the reference updates: those no compiled back-end takes."""
        self._python_walks += 1
        wanted = None if params is None else {id(p) for p in params}
        if wanted is not None and len(wanted) != len(params):
            index = next(i for i, p in enumerate(params) if any(p is q for q in params[:i]))
            raise ValueError(f"params[{index}] is given twice")
        work = []
        for i, group in enumerate(groups):
            hyper = [number_of(group, key) for key in self.rule.hyper]
            for k, param in enumerate(group["params"]):
                if wanted is not None and id(param) not in wanted:
                    continue
                (wanted or set()).discard(id(param))
                name = f"param_groups[{i}]['params'][{k}]"
                if isinstance(param, torch.Tensor) and param.grad is None:
                    continue
                check_param(name, param)
                self._take(param.device.type, groups)
                if self._choices[param.device.type].name != "reference":
                    continue
                check_tensor(f"{name}.grad", param.grad, param)
                for key in needed_states(self.rule, group):
                    if key in state.get(param, ()):
                        check_tensor(f"{name} state", state[param][key], param)
                work.append(Item(param, group, hyper))
        if wanted:
            index = [id(p) in wanted for p in params].index(True)
            raise ValueError(f"params[{index}] is not a parameter of this optimizer")
        return work

    @torch.no_grad()
    def _run_reference(self, work: list[Item], state: dict, grad_multiplier: float) -> None:
        first = {
            id(param)
            for param, group, _ in work
            if any(n not in state.get(param, ()) for n in needed_states(self.rule, group))
        }
        make_states(self.rule, work, state, self._dtype)
        for param, group, hyper in work:
            needed = needed_states(self.rule, group)
            reference.update(
                self.rule,
                param,
                param.grad,
                [state[param][s.name] if s.name in needed else None for s in self.rule.states],
                hyper,
                grad_multiplier=-grad_multiplier if group["maximize"] else grad_multiplier,
                first=id(param) in first,
            )

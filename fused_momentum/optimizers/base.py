"""What all optimizers share: arguments, state, loading and saving, the step. No maths."""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch.autograd import profiler
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from .. import flat, shards
from ..backends import check_request, choose
from ..checks import OPTIONAL_KEYS, check_is_there
from ..plan import NO_AMP, Amp, Plan
from ..rules import Rule
from .arguments import check_lr, check_options, is_not_negative
from .loading import rehomed, shielded

_all: weakref.WeakSet[FusedOptimizer] = weakref.WeakSet()


def _release_locks() -> None:
    """In a forked process: the thread that held one is not there to release it."""
    for optimizer in _all:
        optimizer._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_locks)


class Options(NamedTuple):
    """How an optimizer works, which no checkpoint changes."""

    backend: str
    flatten: bool | str
    state_dtype: torch.dtype | None


class FusedOptimizer(Optimizer):
    """Base of the optimizers: one rule, one plan, one launch per step."""

    rule: ClassVar[Rule]
    # Keys that a group has besides the arguments of the class, with their first values.
    _group_state: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        backend: str,
        flatten: bool | str,
        state_dtype: torch.dtype | None,
    ):
        self._check_group({"params": [], **defaults})
        check_request(backend)
        check_options(params, flatten, state_dtype)
        self._options = Options(backend, flatten, state_dtype)
        self._forget_plan()
        super().__init__(params, defaults)

    # -- arguments ---------------------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        check_lr(group["lr"])
        for key in ("momentum", "weight_decay"):
            if key in group and not is_not_negative(key, group[key]):
                raise ValueError(f"Invalid {key} value: {group[key]}")
        self._refuse_ignored(group)
        if group["fused"] and group["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    def _refuse_ignored(self, group: dict[str, Any]) -> None:
        """Raise where a setting, of a checkpoint perhaps, would have no effect."""
        if group["differentiable"]:
            if group["fused"]:
                raise RuntimeError("`fused` does not support `differentiable`")
            raise RuntimeError(
                "differentiable=True is not supported: the update is written in place by one "
                "kernel; use torch.optim.SGD(differentiable=True)"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; as torch's, but every group's values are checked."""
        if isinstance(param_group, dict):
            if "params" not in param_group:
                raise KeyError(f"a parameter group has no 'params'; its keys: {[*param_group]}")
            params = param_group["params"]
            params = [params] if isinstance(params, torch.Tensor) else params
            if not isinstance(params, set):
                param_group["params"] = params = list(params)
            self._check_group({**self.defaults, **param_group})
            seen: dict[int, int] = {}
            for i, param in enumerate(params):
                param = param[1] if isinstance(param, tuple) else param
                if seen.setdefault(id(param), i) != i:
                    raise ValueError(
                        "optimizer contains a parameter group with duplicate parameters: "
                        f"params[{seen[id(param)]}] and params[{i}] are the same tensor"
                    )
            for key, value in self._group_state.items():
                param_group.setdefault(key, value)
        super().add_param_group(param_group)

    # -- the step ----------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Update every parameter that has a gradient, in place; return the closure's loss.

        ``closure`` re-evaluates the model; it is called once, with gradients enabled. Gradients are
        never modified. Where the GradScaler has set ``found_inf``, nothing changes.
        """
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or profiler._is_profiler_enabled
        ) and type(self).step is FusedOptimizer.step:
            return self._hooked_step(*args, **kwargs)  # hooks see what was given, as it was given
        return self._step(*args, **kwargs)

    # torch wraps `step` of every optimizer class to call hooks and to name the step to the
    # profiler. The wrapper costs more than the update of a small model, so `step` calls it only
    # when needed. The step of a class that overrides it has been wrapped by torch.
    step.hooked = True

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._run(None)
        return loss

    _hooked_step = Optimizer.profile_hook_step(_step)
    step.__signature__ = inspect.signature(_step)

    def step_params(self, params: Iterable[torch.Tensor]) -> None:
        """Update only these parameters, in place, as ``step`` would: one layer at a time.

        Raises ValueError where a tensor is not in the optimizer, or is given twice.
        """
        self._run([params] if isinstance(params, torch.Tensor) else list(params))

    def _run(self, params: list[torch.Tensor] | None) -> None:
        # Under torch.compile the update is one graph break: there is nothing to trace in it.
        if torch.compiler.is_compiling():
            self._run_untraced(params)
        else:
            with self._lock:
                self._update(params)

    @torch._disable_dynamo
    def _run_untraced(self, params: list[torch.Tensor] | None) -> None:
        self._run(params)

    def _update(self, params: list[torch.Tensor] | None) -> bool:
        """Update all parameters, or these; return False where the step was skipped."""
        if not self._plan_step(params):
            return False
        if self._options.flatten:
            # A gradient that moves changes no more than the generation.
            plan, grads = self._plan, self._options.flatten == "grads"
            moves = plan.generation if grads else plan.moves
            if moves != self._moves_seen:
                self._moves_seen = moves
                if not self._is_flat():
                    self.flatten()
        return True

    def _plan_step(self, params: list[torch.Tensor] | None, updates: bool = True) -> bool:
        plan = self._plan or self._planned()
        # Handed over at each step: a plan that kept it would keep the optimizer alive.
        on_measured = None if self.rule.measure is None else self._on_measured
        return plan.step(self.param_groups, self.state, params, self._amp(), updates, on_measured)

    def _planned(self) -> Plan:
        if self._plan is None:
            options = self._options
            self._plan = Plan(self.rule, options.backend, options.state_dtype)
        return self._plan

    def _on_measured(self) -> None:
        """Called in a step that measures, or has made states, before the update."""

    def _amp(self) -> Amp:
        """What the GradScaler has set on this optimizer for the step in progress."""
        values = self.__dict__
        if "found_inf" not in values and "grad_scale" not in values:
            return NO_AMP
        return Amp(values.get("grad_scale"), values.get("found_inf"))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the GradScaler may leave unscaling and skipping to ``step`` (``fused=True``)."""
        return any(group["fused"] for group in self.param_groups)

    def _forget_plan(self) -> None:
        self._plan: Plan | None = None
        self._moves_seen = -1
        if "_lock" not in self.__dict__:  # else a checkpoint was loaded: what is flat stays so
            # Backward hooks may step two layers at once: autograd has a thread for each device.
            self._lock = threading.RLock()
            _all.add(self)
            self._flat_params, self._flat_grads = flat.Home(), flat.Home()

    # -- flat parameters and gradients -------------------------------------------------------------

    def flatten(self) -> list[torch.Tensor]:
        """Move the parameters into flat buffers, one per device and dtype, and return the buffers.

        Each ``p.data`` becomes a slice of a buffer, with p's shape and memory order. With
        ``flatten=True`` this happens after the first step, and after each step that found a
        parameter at another address. ``flatten="grads"`` does the same to the gradients. Sharded
        parameters (DTensor) stay where they are. Raises RuntimeError where memory was given back.
        """
        grads = self._options.flatten == "grads"
        for name, p in self._named_params():
            if not shards.is_sharded(p):
                check_is_there(name, p)
                if grads and p.grad is not None:
                    check_is_there(f"{name}.grad", p.grad)
        # The plan knows the addresses from which they are moved now, and would not miss a return.
        self._moves_seen = -1
        if not self._flat_params.holds(self._movable()):
            self._flat_params = flat.Home.of(self._movable(), "data")
        if grads:
            with_grad = [p for p in self._movable() if p.grad is not None]
            self._flat_grads = flat.Home.of(with_grad, "grad")
        return self._flat_params.buffers

    def _named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        for i, group in enumerate(self.param_groups):
            for k, param in enumerate(group["params"]):
                yield f"param_groups[{i}]['params'][{k}]", param

    def _params(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _movable(self) -> list[torch.Tensor]:
        return [p for p in self._params() if not shards.is_sharded(p)]

    def _is_flat(self) -> bool:
        grads = [p for p in self._movable() if p.grad is not None]
        return self._flat_params.holds(self._movable()) and (
            self._options.flatten != "grads" or self._flat_grads.holds(grads)
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; with ``flatten="grads"`` one memset per buffer, and they stay."""
        if self._flat_grads.buffers:
            grads = [p for p in self._movable() if p.grad is not None]
            if self._flat_grads.holds(grads):
                for buffer in self._flat_grads.buffers:
                    buffer.zero_()
                for p in self._params():
                    if shards.is_sharded(p) and p.grad is not None:
                        p.grad = None if set_to_none else torch.zeros_like(p.grad)
                return
        super().zero_grad(set_to_none)

    # -- saving and loading ------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Of a pickle it is everything, of a state_dict what is new. Nothing of self changes before
        # all of it is there.
        options = state.get("_options") or self._options
        defaults = state.get("defaults") or self.defaults
        for group in state["param_groups"]:
            for key, value in {**defaults, **self._group_state}.items():
                if key not in OPTIONAL_KEYS:  # where they are absent, they were False
                    group.setdefault(key, value)
            self._refuse_ignored(group)
        states = rehomed(
            self.rule, state["state"], state["param_groups"], options.state_dtype, self._complete
        )
        super().__setstate__({**state, "state": states})
        self._forget_plan()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict``, of this class or of its torch twin; states keep their values.

        Unlike torch's, it does not round states to the parameter's dtype, and the loaded tensors
        are copied. Raises ValueError, and changes nothing, where the dict is of another structure.
        """
        # Runs after the user's own hooks, on what they have made of the dict.
        handle = self.register_load_state_dict_pre_hook(FusedOptimizer._shielded)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _shielded(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return shielded(self.rule, state_dict, self._params())

    def _complete(self, held: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
        """Add what another implementation's checkpoint lacks of a parameter's state."""

    # -- what ran ----------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """The back-ends in use and why, one per kind of device."""
        devices = sorted({p.device.type for p in self._params()})
        choices = [(device, choose(self._options.backend, device)) for device in devices]
        return ", ".join(f"{name} for {device} ({reason})" for device, (name, reason) in choices)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}\nbackend: {self.backend}\n)"

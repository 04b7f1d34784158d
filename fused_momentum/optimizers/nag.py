"""Nesterov's accelerated gradient with the exact look-ahead."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .. import shards
from ..checks import check_is_there
from ..rules import RULES
from .momentum import FusedMomentum


class FusedNAG(FusedMomentum):
    r"""Nesterov's accelerated gradient: the gradient is taken at the look-ahead point itself.

    For each parameter with iterate x, at its step t::

        g_t = gradient at x_t + momentum * v_{t-1} (negated with maximize), plus weight_decay times
              that point
        v_t = momentum * v_{t-1} - lr * g_t,   v_0 = 0
        x_{t+1} = x_t + v_t

    Between steps the parameters hold the look-ahead point ``x + momentum * v``, so that the next
    backward pass takes its gradient there. ``eval()`` moves them to the iterate x, for evaluating
    or exporting the model, and ``train()`` back to the look-ahead point. With a constant lr and no
    decoupled decay, which is taken of x, the look-ahead points are those of
    ``FusedSGD(nesterov=True)``. What ``eval()`` and ``train()`` write is rounded once to the
    parameter's dtype.

    Args: as ``FusedMomentum``. The group key ``lookahead_momentum`` holds the momentum with which
    the parameters look ahead now (0 after ``eval()``); it is saved with the groups.

    ``state[p]["velocity"]`` is a slice of a flat buffer. ``step`` changes parameters and velocities
    in place, and never gradients.

    Raises: as ``FusedSGD``; RuntimeError where ``step`` is called between ``eval()`` and
    ``train()``.

    Source: Nesterov, "A method of solving a convex programming problem with convergence rate
    O(1/k^2)" (1983); Sutskever et al. (2013), equations 3 and 4.

    Example:
        >>> import torch, fused_momentum
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = fused_momentum.FusedNAG([w], lr=0.25, momentum=0.5)
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> w.detach()                                     # the look-ahead point
        tensor([0.2500, 0.5000])
        >>> optimizer.eval()
        >>> w.detach()                                     # the iterate
        tensor([0.5000, 1.0000])
        >>> optimizer.train()
    """

    rule = RULES["lookahead"]
    _group_state: ClassVar[dict[str, Any]] = {"lookahead_momentum": 0.0, "evaluating": False}

    def _update(self, params: list[torch.Tensor] | None) -> bool:
        if any(group["evaluating"] for group in self.param_groups):
            raise RuntimeError("FusedNAG: step() after eval(); call train() first")
        stepped = None if params is None else {id(p) for p in params}
        if stepped is not None and torch._C._current_graph_task_id() != -1:
            self._refuse_to_move_others(stepped)
        # A back-end may find out on the device that the step is skipped; the look-ahead of this
        # class is kept on the host, so it has to know.
        if self._amp().skips() or not super()._update(params):
            return False
        for group in self.param_groups:
            before, now = group["lookahead_momentum"], float(group["momentum"])
            if before != now:
                self._look_ahead(group, now - before, stepped)
                group["lookahead_momentum"] = now
        return True

    def _refuse_to_move_others(self, stepped: set[int]) -> None:
        """Raise where this step would move a parameter that the backward pass may yet read."""
        for i, group in enumerate(self.param_groups):
            before, now = group["lookahead_momentum"], float(group["momentum"])
            others = [p for p in group["params"] if id(p) not in stepped and p in self.state]
            if before != now and others:
                raise RuntimeError(
                    f"FusedNAG: the momentum of param_groups[{i}] has changed from {before} to "
                    f"{now}, which moves all its parameters, and a backward pass is under way; "
                    "needed: a constant momentum (schedulers: cycle_momentum=False), or step() "
                    "after the backward pass"
                )

    @torch.no_grad()
    def _look_ahead(self, group: dict, by: float, stepped: set[int] | None) -> None:
        """Move those parameters of a group that the step has not moved."""
        for p in group["params"]:
            moved = p.grad is not None and (stepped is None or id(p) in stepped)
            velocity = self.state.get(p, {}).get("velocity")
            if velocity is not None and not moved:
                # Each operation rounds once, in float32 at least, and the parameter last.
                wide = torch.promote_types(p.dtype, velocity.dtype)
                wide = torch.promote_types(wide, torch.float32)
                p.copy_(p.to(wide) + velocity.to(wide) * by)

    def _move(self, evaluating: bool) -> None:
        for name, p in self._named_params():
            velocity = self.state.get(p, {}).get("velocity")
            if velocity is not None:
                check_is_there(name, shards.part_of(p))
                check_is_there(f"{name} state", shards.part_of(velocity))
        for group in self.param_groups:
            if group["evaluating"] == evaluating:
                continue
            target = 0.0 if evaluating else float(group["momentum"])
            self._look_ahead(group, target - group["lookahead_momentum"], set())
            group["lookahead_momentum"] = target
            group["evaluating"] = evaluating

    def eval(self) -> None:
        """Move the parameters to the iterate x; does nothing if they are there."""
        self._move(evaluating=True)

    def train(self) -> None:
        """Move the parameters to the look-ahead point; does nothing if they are there."""
        self._move(evaluating=False)

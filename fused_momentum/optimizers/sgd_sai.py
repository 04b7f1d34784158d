"""SGD with learning rate scaling at initialization (SGD-SaI)."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from .. import shards
from ..rules import RULES
from .arguments import check_no_torch_form, sgd_keywords
from .base import FusedOptimizer


class FusedSGDSaI(FusedOptimizer):
    r"""Momentum SGD whose learning rate is scaled per tensor, by the tensor's first gradient.

    For each parameter p of n elements with gradient g_t (negated with maximize), at its step t::

        G = |g_1| / (std(g_1) + eps)                          measured once, kept for good
        m_1 = g_1                                             at the parameter's first step
        m_t = momentum * m_{t-1} + (1 - momentum) * g_t       afterwards
        p_{t+1} = (1 - lr * weight_decay) * p_t - lr * G * m_t

    ``|g|`` is the Euclidean norm over all elements and ``std`` the sample standard deviation
    (divisor n - 1), both from float64 sums; m_t is g_t where momentum is 0. A complex tensor counts
    as twice as many real numbers. G is never below ``sqrt(n - 1)`` (but for eps), and for almost
    every gradient within a percent of ``sqrt(n)``: look at it with ``fused_momentum.gsnr``.

    Args:
        params: as ``FusedSGD``.
        lr: learning rate per step, 0 or more; a number or a tensor with one element.
        momentum: fraction of the buffer that is kept per step, from 0 to below 1.
        eps: added to the standard deviation, 0 or more, in units of the gradient.
        weight_decay: fraction of the parameter that a step takes away, over lr; 0 or more.
        scale: "gsnr" is G as above; "gsnr_max" divides it by the largest G of all tensors of such
            groups measured so far (call ``initialise`` before a first ``step_params``);
            "sqrt_numel" is ``sqrt(n)``, whatever the gradient.
        degenerate: what to do where std says nothing. "bound": a first gradient that is constant,
            not finite or of one element gives ``sqrt(max(n - 1, 1))``. "defer": the same, until the
            first gradient that is none of these is measured. In both, an all-zero gradient does
            not count as the first: p decays, and the next gradient is measured. "official": the
            formula to the letter, where a first gradient of zeros stops a tensor for ever.
            Constant: 1 - (mean / root mean square)^2 is below 2^-40.
        maximize: ascend instead of descend.
        dampening, nesterov: accepted at 0 and False, so that a configuration written for
            torch.optim.SGD works.
        foreach, differentiable, fused, capturable, state_dtype, flatten, backend: as ``FusedSGD``.

    All but the last three are read from the group at each step; eps, scale and degenerate act when
    a tensor is measured (scale also says, at each step, whether to divide by the largest).

    ``state[p]`` holds ``momentum_buffer`` (where momentum is not 0), a slice of a flat buffer, and
    0-dim float32 tensors: ``gsnr`` is G; ``stage`` is 0 before the first gradient, 1 when G is
    known and no step was taken, 2 when G will still be replaced, 3 when it is there for good;
    ``gsnr_max`` (unless scale is "gsnr") is the divisor. ``step`` changes parameters and state in
    place, and never gradients.

    A ``state_dict`` of sgd-sai 1.0.3 or of pytorch_optimizer's SGDSaI loads, and training goes on
    with its scales; those that are 0 or not finite are measured anew, unless degenerate is
    "official".

    Raises:
        ValueError: a hyper-parameter out of range, no parameters, duplicate parameters; a loaded
            group that decays through the gradient (``weight_decouple=False``).
        RuntimeError: a back-end that was asked for cannot be used; sparse gradients.

    Source: Xu, Xiang, Cai, Wen, "No More Adam: Learning Rate Scaling at Initialization is All You
    Need" (2024), arXiv 2412.11768, algorithm 1; the package sgd-sai 1.0.3, which does not divide by
    the largest G.

    Example:
        >>> import torch, fused_momentum
        >>> w = torch.nn.Parameter(torch.zeros(5))
        >>> optimizer = fused_momentum.FusedSGDSaI([w], lr=0.5, eps=0.0)
        >>> w.grad = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0])     # norm 4, standard deviation 2
        >>> optimizer.step()
        >>> w.detach(), optimizer.state[w]["gsnr"]
        (tensor([-2.,  2., -2.,  2.,  0.]), tensor(2.))
    """

    rule = RULES["sgd_sai"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float | torch.Tensor = 1e-2,
        *,
        scale: str = "gsnr",
        degenerate: str = "bound",
        dampening: float = 0,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
        flatten: bool | str = False,
        backend: str = "auto",
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale": scale,
            "degenerate": degenerate,
            "dampening": dampening,
            "nesterov": nesterov,
            **sgd_keywords(maximize, foreach, differentiable, fused, capturable=capturable),
        }
        super().__init__(
            params, defaults, backend=backend, flatten=flatten, state_dtype=state_dtype
        )

    def _refuse_ignored(self, group: dict[str, Any]) -> None:
        super()._refuse_ignored(group)
        check_no_torch_form(type(self).__name__, group)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not group["momentum"] < 1.0:
            raise ValueError(f"Invalid momentum value: {group['momentum']}; needed: below 1")
        if not group["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        for key, choices in self.rule.choices.items():
            if group[key] not in choices:
                raise ValueError(f"{key}={group[key]!r} is not one of {list(choices)}")

    def _plan_step(self, params: list[torch.Tensor] | None, updates: bool = True) -> bool:
        for i, group in enumerate(self.param_groups):
            if group["degenerate"] != "defer":
                continue
            for k, param in enumerate(group["params"]):
                if shards.is_sharded(param):
                    raise ValueError(
                        f"param_groups[{i}]: degenerate='defer', but ['params'][{k}] is a DTensor; "
                        "needed: 'bound' or 'official'"
                    )
        return super()._plan_step(params, updates)

    # -- the scales --------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self) -> None:
        """Make the state of every trainable parameter; measure G where there is a gradient.

        No parameter changes, and the first step then keeps the G that was measured here. Call it
        before a step is captured in a CUDA graph: the capture then allocates no state, and a tensor
        without a gradient as yet is measured by the first replay. A gradient that a GradScaler has
        scaled must be unscaled first.
        """
        tensors = [
            (p, group)
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad or p.grad is not None
        ]
        with self._lock:
            self._planned().make_states(tensors, self.state, [])
            self._plan_step(None, updates=False)

    @torch.no_grad()
    def _on_measured(self) -> None:
        """Tell every tensor of ``scale="gsnr_max"`` the largest scale of the model."""
        held = [
            self.state[p]
            for group in self.param_groups
            if group["scale"] == "gsnr_max"
            for p in group["params"]
            if "gsnr_max" in self.state.get(p, ())
        ]
        if not held:
            return
        device = held[0]["gsnr"].device
        scales = [values["gsnr"].to(device, non_blocking=True) for values in held]
        largest = torch.stack(scales).amax()
        largest = torch.where(largest > 0, largest, 1.0)
        # One copy per device, not per tensor.
        torch._foreach_copy_([values["gsnr_max"] for values in held], [largest] * len(held))

    # -- saving and loading ------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        for i, group in enumerate(state["param_groups"]):
            if not group.get("weight_decouple", True) and group.get("weight_decay") != 0:
                raise ValueError(
                    f"param_groups[{i}] has weight_decouple=False and weight_decay="
                    f"{group['weight_decay']}; needed: decoupled decay, or none"
                )
        super().__setstate__(state)

    def _complete(self, held: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
        """Add the ``stage`` of a tensor that another implementation has trained."""
        if "stage" in held or not held:
            return
        measured = "gsnr" in held and (
            group["degenerate"] == "official" or 0.0 < held["gsnr"].item() < float("inf")
        )
        held["stage"] = torch.tensor(3.0 if measured else 2.0, device="cpu")

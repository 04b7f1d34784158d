"""Momentum in its classical form, with a velocity."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from ..rules import RULES
from .arguments import check_no_torch_form, sgd_keywords
from .base import FusedOptimizer


class FusedMomentum(FusedOptimizer):
    r"""Classical momentum: the learning rate acts on the gradient, not on the velocity.

    For each parameter p with gradient g, at its step t::

        g_t = grad (negated with maximize) + weight_decay * p_t
        v_t = momentum * v_{t-1} - lr * g_t,   v_0 = 0
        p_{t+1} = p_t + v_t

    It equals ``FusedSGD(momentum=...)`` while lr is constant; after a change of lr the velocity
    gathered so far keeps its length here, where torch's form rescales it at once.

    Args: as ``FusedSGD``, without dampening and nesterov (accepted at their neutral values so that
    a configuration written for torch.optim.SGD works).

    ``state[p]["velocity"]`` is a slice of a flat buffer. ``step`` changes parameters and velocities
    in place, and never gradients.

    Raises: as ``FusedSGD``.

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods" (1964);
    Sutskever et al. (2013), equations 1 and 2.

    Example:
        >>> import torch, fused_momentum
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = fused_momentum.FusedMomentum([w], lr=0.25, momentum=0.5)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     w.square().sum().backward()
        ...     optimizer.step()
        >>> w.detach(), optimizer.state[w]["velocity"]
        (tensor([0., 0.]), tensor([-0.5000, -1.0000]))
    """

    rule = RULES["velocity"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | None = None,
        flatten: bool | str = False,
        backend: str = "auto",
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            **sgd_keywords(
                maximize,
                foreach,
                differentiable,
                fused,
                capturable=capturable,
                decoupled_weight_decay=decoupled_weight_decay,
            ),
        }
        super().__init__(
            params, defaults, backend=backend, flatten=flatten, state_dtype=state_dtype
        )

    def _refuse_ignored(self, group: dict) -> None:
        super()._refuse_ignored(group)
        check_no_torch_form(type(self).__name__, group)

"""AutoSGM: filters, learning-rate numerators and windows around stochastic gradient descent."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ..rules import RULES
from ..windows import Window
from .autosgm_config import LearningRate, Smoothing, WeightDecay
from .base import FusedOptimizer, sgd_keywords

CONFIGS = {"lr_cfg": LearningRate, "beta_cfg": Smoothing, "wd_cfg": WeightDecay}


class FusedAutoSGM(FusedOptimizer):
    r"""AutoSGM: smoothed, normalized gradient steps with a learning rate per tensor, in one launch.

    For each parameter w with gradient g, at its step t, elementwise::

        g_t = grad + lambda w_t                                    coupled decay (wd_lvl 0)
        v_t = LPF(g; beta_i, gamma_i, eta_i)_t / d_t
        d_t = sqrt(LPF((g + eps)^2; beta_a, 0, eta_i)_t) + eps     1 with aoptlr False
        v_t = v_t + (1 - beta_i) / (1 - gamma_i) lambda w_t        decoupled decay (wd_lvl 1)
        w_{t+1} = w_t - f_t a_t v_t

    LPF is a first-order filter: y_t = c (s_{t-1} + h x_t), s_t = beta (s_{t-1} + h x_t) - gamma h
    x_t, with h = eta_i, or 1 - beta where that is 0, and c = 1 / (1 - gamma); ``debias`` multiplies
    y_t by (1 - beta) / h / (1 - beta^t). f_t is the window (``Window``). a_t, one number per
    tensor, is the numerator (num_lrc), with mean over the tensor and a filter r with pole 0.1::

        0  a = mu
        1  a = r(mean(min(|S|, mu C)));  S_t = beta_n S_{t-1} + mu w_t v_t;  C = 1 + EMA(w^2)
        2  as 1, of w v clipped to 4 EMA(|w v|), over C
        3  a = r(mean(min(EMA(mu (g / d)^2), mu)))
        4  a = mu, and v is shrunk where its distance from its mean norm is 4 times the usual one

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of groups; as for ``FusedSGD``.
        lr_cfg: (aoptlr, lr_init, num_lrc), or give ``learning_rate``, a ``LearningRate``.
        beta_cfg: (beta_n, beta_a, beta_i, gamma_i, eta_i, debias), or ``smoothing``.
        rc_cfg: (rcm, inseq, x, n, m, tau, spe, cfact, e), or ``window``, a ``Window``.
        wd_cfg: (wd_cte, wd_lvl), or ``decay``, a ``WeightDecay``.
        eps_cfg: (eps,), or ``eps``: 0 or more.
        maximize: ascend along the gradient; the decay still shrinks the weights.
        compat: "fixed", or "v1": the published arithmetic, step for step, with its slips:

            * the division by 1 - gamma is missing at a tensor's first step. Fixed: it is there.
            * weights smaller than eps are raised by eps at the first step. Fixed: they are not.
            * num_lrc 4 does the same as 0. Fixed: it clips, as described.
            * ``maximize`` ascends along the decayed gradient, so weights grow. Fixed: as torch.
            * in num_lrc 2 the pole of EMA(|w v|) is beta_n where beta_i is 0. Fixed: beta_a.
            * mu is rounded to float32 with aoptlr True. Fixed: it is not.
            * five slips of the windows: see ``Window``.

        state_dtype, flatten, backend, capturable, fused, foreach, differentiable: as ``FusedSGD``;
            learning rates are read on the host.

    Group keys are the tuples, ``lr`` and ``compat``; all are read at every step. ``lr`` begins as
    lr_init and is what acts, so torch's schedulers do. Parameters and states are changed in place,
    gradients never. State, only what the settings need: ``grad_smooth``, ``grad_var``,
    ``numerator``, ``weight_square``, ``product_size`` (of the parameter's shape, float32 by
    default), ``lr_num``, ``step_norm``, ``step_spread`` (0-dim float64) and ``step`` (0-dim, CPU).

    Raises TypeError or ValueError naming the entry of a tuple that is of the wrong length, type or
    range.

    Source: Somefun et al., "AutoSGM: a unified lowpass regularization framework for accelerated
    learning", ICASSP 2024. The original program has no licence; this one was written from formulas.

    Example:
        >>> import torch, fused_momentum as fm
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fm.FusedAutoSGM([w], lr_cfg=(True, 0.5, 0))
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> w.detach()
        tensor([ 0.5000, -1.5000])
    """

    rule = RULES["autosgm"]

    def __init__(
        self,
        params: ParamsT,
        *,
        lr_cfg: tuple = (True, 1e-2, 0),
        beta_cfg: tuple = (0.9999, 0.999, 0.9, 0.0, 0, True),
        rc_cfg: tuple = (0, 0, 0, 2, 1, 1000, 1, 1, 0),
        wd_cfg: tuple = (0.0, 0),
        eps_cfg: tuple = (1e-10,),
        maximize: bool = False,
        compat: str = "fixed",
        learning_rate: LearningRate | None = None,
        smoothing: Smoothing | None = None,
        window: Window | None = None,
        decay: WeightDecay | None = None,
        eps: float | None = None,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
        flatten: bool | str = False,
        backend: str = "auto",
    ):
        learning_rate = learning_rate or LearningRate.of(lr_cfg)
        defaults = {
            "lr": learning_rate.rate,
            "lr_cfg": learning_rate.published(),
            "beta_cfg": (smoothing or Smoothing.of(beta_cfg)).published(),
            "rc_cfg": rc_cfg if window is None else window.rc_cfg,
            "wd_cfg": (decay or WeightDecay.of(wd_cfg)).published(),
            "eps_cfg": eps_cfg if eps is None else (eps,),
            "compat": compat,
            **sgd_keywords(maximize, foreach, differentiable, fused, capturable),
        }
        super().__init__(
            params, defaults, backend=backend, flatten=flatten, state_dtype=state_dtype
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for key, config in CONFIGS.items():
            config.of(group[key])
        if group["compat"] not in ("fixed", "v1"):
            raise ValueError(f"compat={group['compat']!r} is not one of ['fixed', 'v1']")
        Window.from_rc_cfg(group["rc_cfg"], group["compat"])
        eps_cfg = group["eps_cfg"]
        if not isinstance(eps_cfg, tuple | list) or len(eps_cfg) != 1:
            raise ValueError(f"eps_cfg is {eps_cfg!r}; needed: a tuple (eps,)")
        if isinstance(eps_cfg[0], bool) or not isinstance(eps_cfg[0], numbers.Real):
            raise TypeError(f"eps_cfg[0] is {eps_cfg[0]!r}; needed: a number, 0 or more")
        if not eps_cfg[0] >= 0.0:
            raise ValueError(f"eps_cfg[0] is {eps_cfg[0]!r}; needed: a number, 0 or more")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its ``lr`` is that of its ``lr_cfg``, unless it has one itself."""
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            for key, config in CONFIGS.items():
                if key in param_group:
                    param_group[key] = config.of(param_group[key]).published()
            if "lr_cfg" in param_group:
                param_group.setdefault("lr", LearningRate.of(param_group["lr_cfg"]).rate)
        super().add_param_group(param_group)

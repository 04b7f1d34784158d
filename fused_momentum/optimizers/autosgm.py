"""AutoSGM: filters, learning-rate numerators and windows around stochastic gradient descent."""

from __future__ import annotations

import inspect
import numbers
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ..rules import RULES
from ..windows import Window
from .arguments import sgd_keywords
from .autosgm_config import LearningRate, Smoothing, WeightDecay
from .base import FusedOptimizer

CONFIGS = {"lr_cfg": LearningRate, "beta_cfg": Smoothing, "wd_cfg": WeightDecay}
READABLE = {
    "learning_rate": ("lr_cfg", LearningRate, LearningRate.published),
    "smoothing": ("beta_cfg", Smoothing, Smoothing.published),
    "window": ("rc_cfg", Window, lambda window: window.rc_cfg),
    "decay": ("wd_cfg", WeightDecay, WeightDecay.published),
    "eps": ("eps_cfg", numbers.Real, lambda eps: (eps,)),
}
SETTINGS = (*CONFIGS, "rc_cfg", "eps_cfg", "compat")


def _published(given: dict[str, Any]) -> dict[str, Any]:
    """The keys of a group with tuples in place of readable names, and with the tuples' rate."""
    group = {key: value for key, value in given.items() if key not in READABLE}
    for key, (entry, kind, published) in READABLE.items():
        value = given.get(key)
        if value is None:
            continue
        if not isinstance(value, kind):
            raise TypeError(f"{key} is {value!r}; needed: a {kind.__name__}, for {entry}")
        group[entry] = published(value)
        default = inspect.signature(FusedAutoSGM).parameters[entry].default
        if given.get(entry, default) not in (default, group[entry]):
            raise ValueError(
                f"{key} is {value!r}, which is {entry}={group[entry]}, but {entry}={given[entry]} "
                "is given too; needed: one of the two"
            )
    for key, config in CONFIGS.items():
        if key in group:
            group[key] = config.of(group[key]).published()
    if "lr_cfg" in group and group.get("lr") is None:
        group["lr"] = group["lr_cfg"][1]
    return group


def _check_settings(group: dict[str, Any]) -> None:
    """Raise TypeError or ValueError where a tuple of a group, or its ``compat``, is wrong."""
    for key, config in CONFIGS.items():
        config.of(group[key])
    if group["compat"] not in ("fixed", "v1"):
        raise ValueError(f"compat={group['compat']!r} is not one of ['fixed', 'v1']")
    Window.from_rc_cfg(group["rc_cfg"], group["compat"])
    eps_cfg = group["eps_cfg"]
    if not isinstance(eps_cfg, tuple | list):
        raise TypeError(f"eps_cfg is {eps_cfg!r}; needed: a tuple (eps,)")
    if len(eps_cfg) != 1:
        raise ValueError(f"eps_cfg has {len(eps_cfg)} entries, {eps_cfg!r}; needed: a tuple (eps,)")
    (eps,) = eps_cfg
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(f"eps_cfg[0], eps, is {eps!r}; needed: a number, 0 or more")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps_cfg[0], eps, is {eps!r}; needed: a number, 0 or more")


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
        lr: the learning rate, a number or a tensor of one element, 0 or more; in place of lr_init.
        lr_cfg: (aoptlr, lr_init, num_lrc), or give ``learning_rate``, a ``LearningRate``.
        beta_cfg: (beta_n, beta_a, beta_i, gamma_i, eta_i, debias), or ``smoothing``.
        rc_cfg: (rcm, inseq, x, n, m, tau, spe, cfact, e), or ``window``, a ``Window``
            (whose ``compat`` is the optimizer's).
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

    Group keys are the tuples, ``lr`` and ``compat``; all are read at every step. A group given as a
    dict may have readable names too. ``lr`` begins as lr_init and is what acts, so torch's
    schedulers do. Parameters and states are changed in place,
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
        lr: float | torch.Tensor | None = None,
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
        defaults = _published(
            {
                "lr": lr,
                "lr_cfg": lr_cfg,
                "beta_cfg": beta_cfg,
                "rc_cfg": rc_cfg,
                "wd_cfg": wd_cfg,
                "eps_cfg": eps_cfg,
                "compat": compat,
                "learning_rate": learning_rate,
                "smoothing": smoothing,
                "window": window,
                "decay": decay,
                "eps": eps,
                **sgd_keywords(maximize, foreach, differentiable, fused, capturable=capturable),
            }
        )
        super().__init__(
            params, defaults, backend=backend, flatten=flatten, state_dtype=state_dtype
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check_settings(group)

    def _forget_plan(self) -> None:
        super()._forget_plan()
        self._checked: list[tuple] = []  # by group: settings that were found to be right

    def _plan_step(self, params: list[torch.Tensor] | None, updates: bool = True) -> bool:
        settings = [tuple(map(group.get, SETTINGS)) for group in self.param_groups]
        if settings != self._checked:
            for group in self.param_groups:
                _check_settings(group)
            self._checked = settings
        return super()._plan_step(params, updates)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with tuples or readable names; its lr_init is its ``lr`` if it has none."""
        if isinstance(param_group, dict):
            param_group = _published(param_group)
        super().add_param_group(param_group)

"""Rules written with plain torch operators: what the gate compares with, in float64.

Each formula changes `p` in place, given its gradient `g` and a dict that holds the state.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Plain:
    """Steps a formula over each parameter in turn; an optimizer in all that the bench needs."""

    def __init__(self, params: list[Tensor], formula: Callable, **hyper):
        self.params, self.formula, self.hyper = params, formula, hyper
        self.state = {param: {} for param in params}

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter."""
        for param, kept in self.state.items():
            self.formula(param, param.grad, kept, **self.hyper)


def decoupled_sgd(p: Tensor, g: Tensor, kept: dict, lr, momentum, weight_decay) -> None:
    """Heavy ball with decoupled decay: m = mu m + g;  p = (1 - lr wd) p - lr m."""
    if "m" in kept:
        kept["m"].mul_(momentum).add_(g)
    else:
        kept["m"] = g.clone()
    p.mul_(1 - lr * weight_decay).add_(kept["m"], alpha=-lr)


def sgd_sai(p: Tensor, g: Tensor, kept: dict, lr, momentum, weight_decay, eps=1e-8) -> None:
    """SGD-SaI as released: G = |g| / (std g + eps) once; m = mu m + (1 - mu) g, m_1 = g."""
    if "m" in kept:
        kept["m"].mul_(momentum).add_(g, alpha=1 - momentum)
    else:
        kept["G"], kept["m"] = g.norm() / (g.std().nan_to_num() + eps), g.clone()
    p.mul_(1 - lr * weight_decay).add_(kept["m"], alpha=-(lr * kept["G"]))


def sgd_sai_matrices(p: Tensor, g: Tensor, kept: dict, lr, momentum, weight_decay, eps=1e-8):
    """SGD-SaI as in pytorch_optimizer: m_0 = 0, and G = |g| for vectors and single rows."""
    if not kept:
        sigma = g.std().nan_to_num() if g.ndim > 1 and g.size(0) != 1 else 0.0
        kept["G"] = g.norm() / (sigma + eps) if sigma else g.norm()
        kept["m"] = torch.zeros_like(p)
    kept["m"].mul_(momentum).add_(g, alpha=1 - momentum)
    p.mul_(1 - lr * weight_decay).add_(kept["m"] * kept["G"], alpha=-lr)


def average(kept: dict, name: str, value: Tensor, pole: float) -> Tensor:
    """The exponential average `name` of `value`, from zero."""
    kept[name] = pole * kept.get(name, 0.0) + (1 - pole) * value
    return kept[name]


def autosgm(
    p: Tensor,
    g: Tensor,
    kept: dict,
    lr,
    numerator,
    smooth=0.9,
    moment=0.999,
    weight=0.9999,
    eps=1e-10,
) -> None:
    """AutoSGM, heavy ball with debiasing; `numerator` 0 to 3, or None without a denominator.

    v = average(g) / d, d = sqrt(average((g + eps)^2)) + eps;  p = p - a v, with the scalar a of the
    tensor by the numerator.
    """
    t = kept["t"] = kept.get("t", 0) + 1
    v, d = average(kept, "m", g, smooth) / (1 - smooth**t), torch.ones_like(g)
    if numerator is not None:
        d = (average(kept, "q", (g + eps) ** 2, moment) / (1 - moment**t)).sqrt() + eps
    a, v, u = lr, v / d, g / d
    if numerator in (1, 2):
        bound = 1 + average(kept, "ww", p * p, weight)
        x = p * v
        if numerator == 2:
            usual = average(kept, "wv", x.abs(), moment)
            x = x.sign() * x.abs().minimum(4 * usual) / bound
        kept["S"] = weight * kept.get("S", 0.0) + lr * x
        a = numerator_of(kept, kept["S"].abs().minimum(lr * bound))
    elif numerator == 3:
        a = numerator_of(kept, average(kept, "uu", lr * u * u, weight).clamp(max=lr))
    p.sub_(a * v)


def numerator_of(kept: dict, values: Tensor) -> Tensor:
    """r = 0.1 r + 0.9 mean(values), the tensor's scalar."""
    kept["r"] = 0.1 * kept.get("r", 0.0) + 0.9 * values.mean()
    return kept["r"]

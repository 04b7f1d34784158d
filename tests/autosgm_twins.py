"""Settings with which AutoSGM is an optimizer of torch, and a small training run for both."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, PolynomialLR

STEPS = 12
MU, WD, POLE, VAR = 0.125, 0.05, 0.9, 0.999  # MU is the same number in float32
BETA = (0.9999, VAR, POLE, 0.0, 0, True)
HALF = {"rc_cfg": (1, 0, 0.1, 2, 1, 4, 3, 1, 0)}  # a window of 4 epochs of 3 steps, once


def _values(key, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(key))


START = _values(0, 5)
NOISE = _values(1, STEPS, 5)
CURVATURE = torch.eye(5, dtype=torch.float64) + _values(2, 5, 5) @ _values(2, 5, 5).T / 5


def grad(w, t):
    """The gradient at w in step t: it depends on w, so that runs which differ grow apart."""
    return CURVATURE @ w + NOISE[t]


@dataclass(frozen=True)
class Twin:
    """AutoSGM's keywords, torch's optimizer, and the difference that is stated for them.

    ``stated`` holds for eps = 1e-12 after 12 steps of float64: AutoSGM's second moment is that of
    g + eps, so beside rounding they differ by about eps / |g|, relative to a step.
    """

    optimizer: Callable
    stated: float
    settings: dict = field(default_factory=dict)
    schedule: Callable | None = None
    compats: tuple = ("v1", "fixed")

    def trained(self, eps=1e-12, grad=grad):
        """Torch's parameter after the run."""
        w = torch.nn.Parameter(START.clone())
        optimizer = self.optimizer([w], eps)
        schedule = self.schedule and self.schedule(optimizer)
        for t in range(STEPS):
            w.grad = grad(w.detach(), t)
            optimizer.step()
            if schedule:
                schedule.step()
        return w.detach()


def _plain(pole=0.0, zero=0.0, gain=0, mu=MU, **more):
    beta = (*BETA[:2], pole, zero, gain, False)
    return {"lr_cfg": (False, mu, 0), "beta_cfg": beta, **more}


def _adaptive(pole=POLE, gain=0, debias=True, **more):
    beta = (*BETA[:2], pole, 0.0, gain, debias)
    return {"lr_cfg": (True, MU, 0), "beta_cfg": beta, **more}


def _sgd(**more):
    return lambda params, _: SGD(params, MU, **more)


def _adam(cls=Adam, pole=POLE, **more):
    return lambda params, eps: cls(params, MU, betas=(pole, VAR), eps=eps, **more)


L2, DECOUPLED = {"wd_cfg": (WD, 0)}, {"wd_cfg": (WD, 1)}
ZERO = POLE / (1 + POLE)  # with this zero the filter is Nesterov's momentum
NAG = _plain(POLE, ZERO, 1, **L2)
TWINS = {
    "sgd": Twin(_sgd(weight_decay=WD), 4e-16, _plain(**L2)),
    "sgd_decoupled": Twin(_sgd(weight_decay=WD), 4e-16, _plain(**DECOUPLED)),
    "heavy_ball": Twin(_sgd(momentum=POLE, weight_decay=WD), 4e-16, _plain(POLE, gain=1, **L2)),
    "average": Twin(
        lambda params, _: SGD(params, MU * (1 - POLE), momentum=POLE), 1e-16, _plain(POLE)
    ),
    "nag": Twin(
        _sgd(momentum=POLE, nesterov=True, weight_decay=WD), 4e-15, NAG, compats=("fixed",)
    ),
    "rmsprop": Twin(
        lambda params, eps: RMSprop(params, MU, alpha=VAR, eps=eps, weight_decay=WD),
        7e-10,
        _adaptive(0.0, debias=False, **L2),
    ),
    "adam": Twin(_adam(weight_decay=WD), 1e-11, _adaptive(**L2)),
    "adam_any_gain": Twin(_adam(weight_decay=WD), 1e-11, _adaptive(gain=0.3, **L2)),
    "adamw": Twin(_adam(AdamW, weight_decay=WD * (1 - POLE)), 1e-11, _adaptive(**DECOUPLED)),
    "adamw_unsmoothed": Twin(
        _adam(AdamW, 0.0, weight_decay=WD), 1e-11, _adaptive(0.0, **DECOUPLED)
    ),
    "adam_unsmoothed": Twin(_adam(pole=0.0), 1e-11, _adaptive(0.0)),
    "cosine": Twin(
        _adam(),
        1e-11,
        _adaptive(**HALF),
        lambda o: CosineAnnealingLR(o, STEPS, eta_min=0.1 * MU),
    ),
    "linear": Twin(
        _adam(),
        1e-11,
        _adaptive(rc_cfg=(2, 0, 0.1, 1, 1, 4, 3, 1, 0)),
        lambda o: LinearLR(o, 1.0, 0.1, STEPS),
    ),
    "polynomial": Twin(
        _sgd(),
        2e-16,
        _plain(rc_cfg=(2, 0, 0, 3, 1, 4, 3, 1, 0)),
        lambda o: PolynomialLR(o, STEPS, power=3),
    ),
    "maximize": Twin(_adam(maximize=True), 2e-11, _adaptive(maximize=True)),
    "maximize_decay": Twin(
        _adam(maximize=True, weight_decay=WD), 2e-11, _adaptive(maximize=True, **L2),
        compats=("fixed",),
    ),
}  # fmt: skip
twins = pytest.mark.parametrize(
    ("name", "compat"), [(name, c) for name, twin in TWINS.items() for c in twin.compats]
)

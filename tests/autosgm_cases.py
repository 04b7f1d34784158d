"""Every configuration of AutoSGM, gradients with outliers, and the distance from the model."""

import functools
import itertools

import torch
from autosgm_model import BETA, WINDOW

from fused_momentum.rules.autosgm import AUTOSGM

STEPS = 12
RATES = {"const": (False, 0.1, 0)} | {str(n): (True, 0.1, n) for n in range(5)}
ZEROS = {"none": (0.0, 0.0), "hb": (0.9, 0.0), "nag": (0.9, 0.9 / 1.9), "other": (0.9, 0.55),
         "negative": (0.9, -0.4), "fir": (0.0, -0.4)}  # fmt: skip
GAINS = {"debias": (0, True), "average": (0, False), "sum": (1, False)}
DECAYS = {"none": (0.0, 0), "l2": (0.05, 0), "decoupled": (0.05, 1)}
WINDOWS = [
    WINDOW,
    (1, 0, 0.1, 2, 1, 5, 1, 1, 0),  # begins anew at t = 6 and 11
    (1, 0, 0, 3, 0, 2, 3, 1, 0.4),
    (2, 1, 0, 2, 1, 2, 4, 1, 0.3),
    (3, 0, 0, 0.1, 1, 2, 3, 0, 0),
    (4, 0, 0, 2, 0, 3, 3, 3, 0),
    (5, 1, 0.2, 4, 1, 3, 2, 4, 0),
    (6, 0, 0, 4, 1, 2, 5, 2, 0),
]


CASES = list(itertools.product(RATES, ZEROS, GAINS, DECAYS, ["v1", "fixed"]))


def settings_of(case):
    """Keywords of the model; window, poles and direction take turns, each at its own pace."""
    rate, zero, gain, decay, compat = case
    turn = CASES.index(case) // 2  # both compats take the same
    return {
        "lr_cfg": RATES[rate],
        "beta_cfg": (BETA[0] if turn % 7 < 4 else 0.7, 0.99, *ZEROS[zero], *GAINS[gain]),
        "rc_cfg": WINDOWS[turn % len(WINDOWS)],
        "wd_cfg": DECAYS[decay],
        "eps_cfg": (1e-3,),
        "maximize": turn % 5 < 2,
        "compat": compat,
    }


@functools.cache
def values(key, *shape):
    """Normal random numbers, outliers among them, and exact zeros; float32 in float64."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(key)).double()
    flat = x.view(-1)
    flat[key % len(flat)] *= 0.0 if key % 3 == 0 else 30.0
    return x


def gap(a, b):
    """The largest difference, relative to the largest value."""
    return ((a.double() - b).abs().max() / b.abs().max().clamp(min=1.0)).item()


def gaps(p, held, model):
    """Of the parameter, and of those states and numbers that it has."""
    yield gap(p.detach(), model.w)
    filters = (model.m, model.q, model.pc, model.wsq, model.pcx)
    # The published ascent filters the gradient, ours the negated gradient; numerator 3 its square.
    odd = ("grad_smooth",) if model.lr_cfg[2] == 3 else ("grad_smooth", "numerator")
    for state, filtered in zip(AUTOSGM.states, filters, strict=True):
        if state.name in held:
            sign = -1 if model.v1 and model.maximize and state.name in odd else 1
            yield gap(held[state.name], sign * filtered.s)
    for kept, number in zip(AUTOSGM.kept, (model.r, model.c1, model.c2), strict=True):
        if kept.name in held:
            yield gap(held[kept.name], torch.as_tensor(number))


# A step rounds less than a hundred times, by half an ulp of values no larger than what `gap`
# divides by; the filters damp what was there before, and p carries it on. The worst seen is a
# fiftieth of this.
LIMIT = {torch.float64: STEPS * 100 * 2**-53, torch.float32: STEPS * 100 * 2**-24}

"""AutoSGM's rule, run by the reference on single tensors, against the float64 model."""

import functools
import itertools

import pytest
import torch
from autosgm_model import BETA, LR, WINDOW, Model

from fused_momentum import reference
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


class Tensor:
    """One parameter with the states that the rule asks for, moved by the reference."""

    def __init__(self, start, dtype=torch.float64, **settings):
        self.p = start.to(dtype).clone()
        self.group = {
            "lr_cfg": LR, "beta_cfg": BETA, "rc_cfg": WINDOW, "wd_cfg": (0.0, 0),
            "eps_cfg": (1e-10,), "maximize": False, "compat": "fixed", **settings,
        }  # fmt: skip
        self.group["lr"] = self.group["lr_cfg"][1]
        self.held = {}
        self.t = 0

    def step(self, grad):
        self.t += 1
        hyper = AUTOSGM.read(self.group, self.t)
        on = dict(zip(AUTOSGM.hyper, hyper, strict=True))
        states, kept = [], []
        for entry in AUTOSGM.states:
            zeros = torch.zeros_like(self.p)
            states.append(self.held.setdefault(entry.name, zeros) if on[entry.when] else None)
        for entry in AUTOSGM.kept:
            zero = torch.zeros((), dtype=torch.float64)
            kept.append(self.held.setdefault(entry.name, zero) if on[entry.when] else None)
        sign = -1.0 if self.group["maximize"] else 1.0
        grad = grad.to(self.p.dtype)
        update = reference.Update(AUTOSGM, self.p, grad, states, kept, hyper, grad_multiplier=sign)
        if not update.settled():
            update.measure()
        update.update()


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


def gaps(ours, model):
    """Of the parameter, its states and its numbers, as far as it has them."""
    yield gap(ours.p, model.w)
    filters = (model.m, model.q, model.pc, model.wsq, model.pcx)
    # The published ascent filters the gradient, ours the negated gradient; numerator 3 its square.
    odd = ("grad_smooth",) if model.lr_cfg[2] == 3 else ("grad_smooth", "numerator")
    for state, filtered in zip(AUTOSGM.states, filters, strict=True):
        if state.name in ours.held:
            sign = -1 if model.v1 and model.maximize and state.name in odd else 1
            yield gap(ours.held[state.name], sign * filtered.s)
    for kept, number in zip(AUTOSGM.kept, (model.r, model.c1, model.c2), strict=True):
        if kept.name in ours.held:
            yield gap(ours.held[kept.name], torch.as_tensor(number))


# A step rounds less than a hundred times, by half an ulp of values no larger than what `gap`
# divides by; the filters damp what was there before, and p carries it on. The worst seen is a
# fiftieth of this.
LIMIT = {torch.float64: STEPS * 100 * 2**-53, torch.float32: STEPS * 100 * 2**-24}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("zero", ZEROS)
def test_every_configuration(rate, zero):
    cases = [case for case in CASES if case[:2] == (rate, zero)]
    for case, shape in zip(cases, itertools.cycle([(7,), (), (3, 2)]), strict=False):
        settings = settings_of(case)
        model = Model(values(0, *shape), **settings)
        ours = {dtype: Tensor(values(0, *shape), dtype, **settings) for dtype in LIMIT}
        for t in range(1, STEPS + 1):
            model.step(values(t, *shape))
            for dtype, tensor in ours.items():
                tensor.step(values(t, *shape))
                assert max(gaps(tensor, model)) <= LIMIT[dtype], (case, dtype, t)

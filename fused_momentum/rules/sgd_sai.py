"""SGD with learning rate Scaling at Initialization."""

from __future__ import annotations

from .functions import div, sqrt, where, widen
from .table import Kept, Measure, Rule, State

# stage of a tensor: 0 it has seen no gradient, 1 its scale is known and it has not started, 2 it
# has started with a scale that will be replaced, 3 with its scale for good.


def derive_sgd_sai(
    lr, momentum, weight_decay, eps, scale, degenerate, first, gsnr, stage, gsnr_max
):
    rate = lr * where(scale == 1.0, div(gsnr, gsnr_max), gsnr)
    gain = 1.0 - momentum * (1.0 - first)
    decay = 1.0 - lr * weight_decay
    return rate, momentum, gain, decay


def sgd_sai(p, g, m, rate, mu, gain, decay):
    d = g
    if mu != 0.0:
        m = mu * m + gain * g
        d = m
    p = decay * p - rate * d
    return p, m


def reads_sgd_sai(rate, mu, gain, decay):
    return 1.0, 1.0, where(mu != 0.0, 1.0, 0.0)


def gradient_terms(p, g, m, rate, mu, gain, decay):
    g = widen(g)
    return g, g * g


def reads_gradient(rate, mu, gain, decay):
    return 0.0, 1.0, 0.0


def settle_sgd_sai(
    lr, momentum, weight_decay, eps, scale, degenerate,
    numel, updates, gsnr, stage, gsnr_max, total, squares,
):  # fmt: skip
    others = numel - 1.0
    variance = div(squares - total * div(total, numel), others)
    deviation = sqrt(where(variance > 0.0, variance, 0.0))
    # Below this (2^-40) the entries are equal, but for their rounding; NaN compares false.
    usable = others * variance > 9.094947017729282e-13 * squares
    measured = div(sqrt(squares), deviation + eps)
    if scale == 2.0:
        usable = squares != 0.0
        measured = sqrt(numel)
    official = degenerate == 1.0
    counts = official | (squares != 0.0)
    good = counts & (official | usable | (degenerate == 0.0) | (others < 1.0))
    bound = sqrt(where(others > 1.0, others, 1.0))
    found = where(official | usable, measured, where(squares != 0.0, bound, gsnr))
    known = stage == 1.0
    starts = counts & (updates != 0.0)
    then = where(known | good, 3.0, 2.0)
    then = where(starts, then, where(good, where(stage == 2.0, 3.0, 1.0), stage))
    return where(starts & (stage < 2.0), 1.0, 0.0), where(known, gsnr, found), then, gsnr_max


def settled_sgd_sai(lr, momentum, weight_decay, eps, scale, degenerate, gsnr, stage, gsnr_max):
    return where(stage == 3.0, 1.0, 0.0)


SGD_SAI = Rule(
    name="sgd_sai",
    hyper=("lr", "momentum", "weight_decay", "eps", "scale", "degenerate"),
    choices={
        "scale": ("gsnr", "gsnr_max", "sqrt_numel"),
        "degenerate": ("bound", "official", "defer"),
    },
    scalars=("rate", "mu", "gain", "decay"),
    derive=derive_sgd_sai,
    states=(State("momentum_buffer", when="momentum"),),
    kept=(Kept("gsnr"), Kept("stage"), Kept("gsnr_max", initial=1.0, when="scale")),
    update=sgd_sai,
    reads=reads_sgd_sai,
    measure=Measure(
        terms=gradient_terms,
        sums=2,
        settle=settle_sgd_sai,
        settled=settled_sgd_sai,
        reads=reads_gradient,
    ),
    formula="m = mu m + (1 - mu) g;  p = (1 - lr wd) p - lr G m;  G = |g_1| / (std(g_1) + eps)",
    source="Xu et al. 2024 (arXiv 2412.11768), algorithm 1",
    worked=(
        {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.5, "eps": 0.0},
        ([2.0, -2.0, 2.0, -2.0, 0.0], [4.0, 8.0, -16.0, 0.0, 1.0]),
        # |g| = 4, std = sqrt(16 / 4) = 2, G = 2, lr G = 1; m = g; p = 3p/4 - m
        (
            [2.0, -2.0, 2.0, -2.0, 0.0],
            [1.0, 8.0, -14.0, 2.0, 0.75],
            [2.0, -2.0, 2.0, -2.0, 0.0],
        ),
        # m = m/2 + g/2; p = 3p/4 - m, with the G of the first step
        (
            [4.0, 0.0, 0.0, 0.0, 8.0],
            [-2.25, 7.0, -11.5, 2.5, -3.4375],
            [3.0, -1.0, 1.0, -1.0, 4.0],
        ),
    ),
)

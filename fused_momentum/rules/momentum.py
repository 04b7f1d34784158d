"""Momentum in its classical velocity form, and Nesterov's with an exact look-ahead."""

from __future__ import annotations

from .table import Rule, State


def derive_velocity(lr, momentum, weight_decay, decoupled_weight_decay, first):
    wd = weight_decay * (1.0 - decoupled_weight_decay)
    decay = 1.0 - lr * weight_decay * decoupled_weight_decay
    return lr, momentum, wd, decay


def velocity(p, g, v, lr, mu, wd, decay):
    if wd != 0.0:
        g = g + wd * p
    v = mu * v - lr * g
    p = decay * p + v
    return p, v


def derive_lookahead(lr, momentum, weight_decay, decoupled_weight_decay, lookahead_momentum, first):
    wd = weight_decay * (1.0 - decoupled_weight_decay)
    decay = 1.0 - lr * weight_decay * decoupled_weight_decay
    return lr, momentum, wd, decay, lookahead_momentum


def lookahead(p, g, v, lr, mu, wd, decay, ahead):
    if wd != 0.0:
        g = g + wd * p
    x = p - ahead * v
    v = mu * v - lr * g
    x = decay * x + v
    p = x + mu * v
    return p, v


VELOCITY = Rule(
    name="velocity",
    hyper=("lr", "momentum", "weight_decay", "decoupled_weight_decay"),
    scalars=("lr", "mu", "wd", "decay"),
    derive=derive_velocity,
    states=(State("velocity"),),
    update=velocity,
    formula="v = mu v - lr g;  p = p + v",
    source="Polyak 1964; Sutskever et al. 2013, equations 1 and 2",
    worked=(
        {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.5},
        ([1.0, -2.0, 0.0], [4.0, 8.0, -16.0]),
        # g = [3, 2, -8]; v = -g/2; p = p + v
        ([1.0, -2.0, 0.0], [2.5, 7.0, -12.0], [-1.5, -1.0, 4.0]),
        # g = [2.25, 1.5, -6]; v = v/2 - g/2 = [-1.875, -1.25, 5]
        ([1.0, -2.0, 0.0], [0.625, 5.75, -7.0], [-1.875, -1.25, 5.0]),
    ),
)

LOOKAHEAD = Rule(
    name="lookahead",
    hyper=(
        "lr",
        "momentum",
        "weight_decay",
        "decoupled_weight_decay",
        "lookahead_momentum",
    ),
    scalars=("lr", "mu", "wd", "decay", "ahead"),
    derive=derive_lookahead,
    states=(State("velocity"),),
    update=lookahead,
    formula="v = mu v - lr g(x + mu v);  x = x + v;  p holds x + mu v",
    source="Nesterov 1983; Sutskever et al. 2013, equations 3 and 4",
    worked=(
        {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.5},
        ([1.0, -2.0, 0.0], [4.0, 8.0, -16.0]),
        # g = [3, 2, -8]; v = -g/2; x = p + v; p = x + v/2
        ([1.0, -2.0, 0.0], [1.75, 6.5, -10.0], [-1.5, -1.0, 4.0]),
        # g = [1.875, 1.25, -5]; x = p - v/2 = [2.5, 7, -12]; v = v/2 - g/2
        # = [-1.6875, -1.125, 4.5]; x = x + v = [0.8125, 5.875, -7.5]; p = x + v/2
        ([1.0, -2.0, 0.0], [-0.03125, 5.3125, -5.25], [-1.6875, -1.125, 4.5]),
    ),
)

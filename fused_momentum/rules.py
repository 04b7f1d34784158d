"""The maths of every optimizer: one plain function per rule, and one table row beside it.

A rule is told twice in this project: here, and in ``csrc/rules.h`` with the same names in the same
order. The functions below are executed as they stand by the reference (on torch tensors) and by the
Triton kernels (through ``triton.jit``), so they may use only ``+ - *``, comparisons, and ``if`` on
a scalar. One operation is one rounding: the order of the operations *is* the definition.

``derive`` turns the hyper-parameters of a group (float64) into the scalars of an update; each
scalar is rounded once to the type that the update computes in. ``update`` is elementwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

# Triton resolves the names a rule uses through this module's globals and needs its language there.
with contextlib.suppress(ImportError):
    import triton.language as tl  # noqa: F401


@dataclass(frozen=True)
class State:
    """A tensor kept per parameter, of the parameter's shape: ``optimizer.state[p][name]``.

    ``when`` names a hyper-parameter: the state exists only in groups where that is not zero.
    """

    name: str
    when: str | None = None


@dataclass(frozen=True)
class Rule:
    """One row of the table: how a rule is called, and what it needs.

    ``hyper``: keys of a parameter group, in the order in which ``derive`` takes them; ``derive``
    takes the ``tensor_scalars`` after them. ``scalars``: what ``derive`` returns. ``update(p, g,
    *states, *scalars)`` returns ``(p, *states)``, then ``sums`` terms that are summed over the
    tensor. ``worked`` holds steps done by hand, as a test: hyper-parameters, then per step ``(g,
    p, *states)``.
    """

    name: str
    hyper: tuple[str, ...]
    scalars: tuple[str, ...]
    derive: Callable[..., tuple]
    states: tuple[State, ...]
    update: Callable[..., tuple]
    formula: str
    source: str
    tensor_scalars: tuple[str, ...] = ("first",)
    sums: int = 0
    worked: tuple = ()


def derive_sgd(lr, momentum, dampening, weight_decay, nesterov, decoupled_weight_decay, first):
    # The buffer starts at zero, so a gain of 1 at a tensor's first step makes it exactly g.
    gain = 1.0 - dampening * (1.0 - first)
    wd = weight_decay * (1.0 - decoupled_weight_decay)
    decay = 1.0 - lr * weight_decay * decoupled_weight_decay
    return lr, momentum, gain, wd, decay, nesterov


def sgd(p, g, m, lr, mu, gain, wd, decay, nesterov):
    if wd != 0.0:
        g = g + wd * p
    d = g
    if mu != 0.0:
        m = mu * m + gain * g
        d = m
        if nesterov != 0.0:
            d = g + mu * m
    p = decay * p - lr * d
    return p, m


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


RULES = {
    rule.name: rule
    for rule in (
        Rule(
            name="sgd",
            hyper=(
                "lr",
                "momentum",
                "dampening",
                "weight_decay",
                "nesterov",
                "decoupled_weight_decay",
            ),
            scalars=("lr", "mu", "gain", "wd", "decay", "nesterov"),
            derive=derive_sgd,
            states=(State("momentum_buffer", when="momentum"),),
            update=sgd,
            formula="m = mu m + (1 - dampening) g;  p = p - lr (g + mu m if nesterov else m)",
            source="torch.optim.SGD; Sutskever et al. 2013, section 2",
            worked=(
                {
                    "lr": 0.5,
                    "momentum": 0.5,
                    "dampening": 0.25,
                    "weight_decay": 0.5,
                    "nesterov": False,
                },
                ([1.0, -2.0, 0.0], [4.0, 8.0, -16.0]),
                # g = grad + p/2 = [3, 2, -8]; m = g; p = p - m/2
                ([1.0, -2.0, 0.0], [2.5, 7.0, -12.0], [3.0, 2.0, -8.0]),
                # g = [2.25, 1.5, -6]; m = m/2 + 3g/4 = [3.1875, 2.125, -8.5]; p = p - m/2
                ([1.0, -2.0, 0.0], [0.90625, 5.9375, -7.75], [3.1875, 2.125, -8.5]),
            ),
        ),
        Rule(
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
        ),
        Rule(
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
        ),
    )
}

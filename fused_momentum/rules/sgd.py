"""SGD, heavy ball and Nesterov momentum in torch's form."""

from __future__ import annotations

from .functions import where
from .table import Rule, State


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


def reads_sgd(lr, mu, gain, wd, decay, nesterov):
    return 1.0, 1.0, where(mu != 0.0, 1.0, 0.0)


SGD = Rule(
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
    reads=reads_sgd,
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
)

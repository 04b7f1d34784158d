"""AutoSGM: a lowpass filter on the gradient, moment estimates, and learning rates per tensor.

All filters keep their output already decayed, s = pole (s + gain x) - zero gain x, so that the next
output is s + gain x. In the elementwise functions no ``if`` stands inside another: C++ compilers
turn a loop into vector instructions then, whatever the scalars are.
"""

from __future__ import annotations

import ctypes
import functools

from ..checks import number_of
from ..windows import Window
from .functions import absolute, div, sqrt, where, widen
from .table import Kept, Measure, Rule, State

# What both passes know: numbers of one group at one step of a tensor. 0 or 1: smoothed, normalized,
# averaged (numerators 1 to 3), correlated (1 and 2), clipped (2).
SCALARS = (
    "shift",  # weights below it are raised by it
    "wd",  # decay through the filters
    "smoothed",
    "gain",
    "pole",
    "lead",  # zero of the filter times its gain
    "debias",
    "normalized",
    "offset",  # added to the gradient before it is squared
    "var_gain",
    "var_pole",
    "var_debias",
    "eps",
    "decay",  # beside the filters
    "rate",
    "averaged",
    "correlated",
    "clipped",
    "mu",
    "num_gain",
    "num_pole",
    "size_gain",
    "size_pole",
)


@functools.lru_cache(maxsize=64)
def _window(rc_cfg: tuple, compat: str) -> Window:
    return Window.from_rc_cfg(rc_cfg, compat)


def read_autosgm(group: dict, t: int) -> tuple[float, ...]:
    """Everything that follows from a group's settings at step ``t`` of a tensor."""
    v1 = group["compat"] == "v1"
    estimates, _, numerator = group["lr_cfg"]
    beta_n, beta_a, beta, gamma, eta, debiased = group["beta_cfg"]
    wd, decoupled = group["wd_cfg"]
    eps = float(group["eps_cfg"][0])
    mu = number_of(group, "lr")
    if estimates and v1:
        mu = ctypes.c_float(mu).value
    measured = (0 if v1 and numerator == 4 else numerator) if estimates else 0
    # The published step ascends along the decayed gradient. The engine gives the negated gradient,
    # so everything that is not the gradient is negated as well.
    sign = -1.0 if v1 and group["maximize"] else 1.0
    gain = float(eta) or 1.0 - beta
    var_gain = float(eta) or 1.0 - beta_a
    debias = 1.0 if v1 and t == 1 else 1.0 / (1.0 - gamma)
    var_debias = 1.0
    if debiased:
        debias *= (1.0 - beta) / gain / (1.0 - beta**t)
        var_debias = (1.0 - beta_a) / var_gain / (1.0 - beta_a**t)
    size_pole = beta_n if v1 and beta == 0 else beta_a
    window = _window(tuple(group["rc_cfg"]), group["compat"])(t)
    return (
        eps if v1 and t == 1 else 0.0,
        0.0 if decoupled else sign * wd,
        float(beta != gamma),
        gain,
        beta,
        gamma * gain,
        debias,
        float(estimates),
        sign * eps,
        var_gain,
        beta_a,
        var_debias,
        eps,
        sign * wd * (1.0 - beta) / (1.0 - gamma) if decoupled else 0.0,
        window * (1.0 if measured in (1, 2, 3) else mu),
        float(measured in (1, 2, 3)),
        float(measured in (1, 2)),
        float(measured == 2),
        mu,
        1.0 - beta_n,
        beta_n,
        1.0 - size_pole,
        size_pole,
        float(measured == 4),
    )


def derive_autosgm(
    shift, wd, smoothed, gain, pole, lead, debias, normalized, offset, var_gain, var_pole,
    var_debias, eps, decay, rate, averaged, correlated, clipped, mu, num_gain, num_pole, size_gain,
    size_pole, limited, first, shrink, lr_num, step_norm, step_spread,
):  # fmt: skip
    rate = rate * where(averaged != 0.0, lr_num, where(limited != 0.0, shrink, 1.0))
    return (
        shift, wd, smoothed, gain, pole, lead, debias, normalized, offset, var_gain, var_pole,
        var_debias, eps, decay, rate, averaged, correlated, clipped, mu, num_gain, num_pole,
        size_gain, size_pole,
    )  # fmt: skip


def prepare(p, g, shift, wd):
    """The weight and the gradient that the filters take."""
    p = where(absolute(p) < shift, p + shift, p)
    if wd != 0.0:
        g = g + wd * p
    return p, g


def smooth(g, m, smoothed, gain, pole, lead, debias):
    """The filtered gradient, and the filter's new state."""
    y = gain * g
    if smoothed != 0.0:
        y = m + y
        m = pole * y - lead * g
    return debias * y, m


def deviation(g, q, offset, var_gain, var_pole, var_debias, eps):
    """The root of the gradient's second moment, and the new state of its filter."""
    e = g + offset
    y = q + var_gain * (e * e)
    return sqrt(var_debias * y) + eps, var_pole * y


def autosgm(
    p, g, m, q, num, squares, sizes, shift, wd, smoothed, gain, pole, lead, debias, normalized,
    offset, var_gain, var_pole, var_debias, eps, decay, rate, averaged, correlated, clipped, mu,
    num_gain, num_pole, size_gain, size_pole,
):  # fmt: skip
    p, g = prepare(p, g, shift, wd)
    v, m = smooth(g, m, smoothed, gain, pole, lead, debias)
    if normalized != 0.0:
        d, q = deviation(g, q, offset, var_gain, var_pole, var_debias, eps)
        v = div(v, d)
    if decay != 0.0:
        v = v + decay * p
    p = p - rate * v
    return p, m, q


def reads_autosgm(
    shift, wd, smoothed, gain, pole, lead, debias, normalized, offset, var_gain, var_pole,
    var_debias, eps, decay, rate, averaged, correlated, clipped, mu, num_gain, num_pole, size_gain,
    size_pole,
):  # fmt: skip
    return 1.0, 1.0, smoothed, normalized, 0.0, 0.0, 0.0


def numerator_terms(
    p, g, m, q, num, squares, sizes, shift, wd, smoothed, gain, pole, lead, debias, normalized,
    offset, var_gain, var_pole, var_debias, eps, decay, rate, averaged, correlated, clipped, mu,
    num_gain, num_pole, size_gain, size_pole,
):  # fmt: skip
    p, g = prepare(p, g, shift, wd)
    v, m = smooth(g, m, smoothed, gain, pole, lead, debias)
    d, q = deviation(g, q, offset, var_gain, var_pole, var_debias, eps)
    moment = averaged != correlated
    plus = where(moment, 0.0, decay)
    if moment:
        v = g
    v = div(v, d)
    if plus != 0.0:
        v = v + plus * p
    x = num_gain * (v * v)
    w = squares
    if correlated != 0.0:
        x = p * v
        w = squares + num_gain * (p * p)
        squares = num_pole * w
    c = 1.0 + w
    if clipped != 0.0:
        size = sizes + size_gain * absolute(x)
        sizes = size_pole * size
        most = 4.0 * size
        x = where(x > most, most, x)
        x = where(x < 0.0 - most, 0.0 - most, x)
        x = div(x, c)
    s = num + mu * x
    num = num_pole * s
    s = absolute(s)
    c = mu * c
    s = where(s > c, c, s)
    total = widen(where(averaged != 0.0, s, v))
    return num, squares, sizes, total, total * total


def reads_numerator_terms(
    shift, wd, smoothed, gain, pole, lead, debias, normalized, offset, var_gain, var_pole,
    var_debias, eps, decay, rate, averaged, correlated, clipped, mu, num_gain, num_pole, size_gain,
    size_pole,
):  # fmt: skip
    moment = averaged != correlated
    weight = (wd != 0.0) | (correlated != 0.0) | ((decay != 0.0) & (averaged == correlated))
    return (
        where(weight, 1.0, 0.0), 1.0, where(moment, 0.0, smoothed), 1.0,
        averaged, correlated, clipped,
    )  # fmt: skip


def settle_autosgm(
    shift, wd, smoothed, gain, pole, lead, debias, normalized, offset, var_gain, var_pole,
    var_debias, eps, decay, rate, averaged, correlated, clipped, mu, num_gain, num_pole, size_gain,
    size_pole, limited, numel, updates, lr_num, step_norm, step_spread, total, other,
):  # fmt: skip
    # Numerators 1 to 3 have summed what lr_num follows, numerator 4 the step.
    lr_num = where(averaged != 0.0, div(lr_num + 9.0 * div(total, numel), 10.0), lr_num)
    norm_now = num_pole * step_norm + num_gain * sqrt(other)
    away = other - 2.0 * norm_now * total + numel * norm_now * norm_now
    distance = sqrt(where(away > 0.0, away, 0.0)) + eps
    spread_now = num_pole * step_spread + num_gain * (distance * distance)
    most = 4.0 * (sqrt(spread_now) + eps)
    shrink = where(distance > most, div(most, distance), 1.0)
    step_norm = where(limited != 0.0, norm_now, step_norm)
    step_spread = where(limited != 0.0, spread_now, step_spread)
    return 0.0, shrink, lr_num, step_norm, step_spread


def settled_autosgm(
    shift, wd, smoothed, gain, pole, lead, debias, normalized, offset, var_gain, var_pole,
    var_debias, eps, decay, rate, averaged, correlated, clipped, mu, num_gain, num_pole, size_gain,
    size_pole, limited, lr_num, step_norm, step_spread,
):  # fmt: skip
    return where((averaged != 0.0) | (limited != 0.0), 0.0, 1.0)


AUTOSGM = Rule(
    name="autosgm",
    hyper=(*SCALARS, "limited"),
    scalars=SCALARS,
    derive=derive_autosgm,
    states=(
        State("grad_smooth", when="smoothed"),
        State("grad_var", when="normalized"),
        State("numerator", when="averaged"),
        State("weight_square", when="correlated"),
        State("product_size", when="clipped"),
    ),
    tensor_scalars=("first", "shrink"),
    kept=(
        Kept("lr_num", dtype="float64", when="averaged"),
        Kept("step_norm", dtype="float64", when="limited"),
        Kept("step_spread", dtype="float64", when="limited"),
    ),
    update=autosgm,
    reads=reads_autosgm,
    writes=("grad_smooth", "grad_var"),
    measure=Measure(
        terms=numerator_terms,
        sums=2,
        settle=settle_autosgm,
        settled=settled_autosgm,
        settles=False,
        reads=reads_numerator_terms,
        writes=("numerator", "weight_square", "product_size"),
    ),
    read=read_autosgm,
    worked=(
        {
            "lr_cfg": (True, 0.5, 0),
            "beta_cfg": (0.5, 0.75, 0.5, -1, 1, False),
            "rc_cfg": (2, 0, 0, 1, 1, 2, 1, 1, 0),  # 1, then a half
            "wd_cfg": (0.5, 1),
            "eps_cfg": (0,),
        },
        (None, [0.0, 4.0]),
        ([2.0, -2.0], [-0.25, 4.0], [3.0, -3.0], [3.0, 3.0]),
        ([1.0, -1.0], [-0.4921875, 4.125], [3.0, -3.0], [3.0, 3.0]),
    ),
    formula="v = LPF(g) / (sqrt(LPF((g + eps)^2)) + eps);  p = p - f_t a v",
    source="Somefun, AutoSGM, ICASSP 2024",
)

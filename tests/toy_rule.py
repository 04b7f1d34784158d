"""Rules for tests of the engine, in no table.

TOY has everything that a rule may have; SPY looks at streams that it says it does not read.
"""

from fused_momentum.rules import Kept, Measure, Rule, State
from fused_momentum.rules.functions import absolute, div, sqrt, where, widen

SHARE = 0.1


def ratio(x, y):
    return div(x, absolute(y) + SHARE)


def derive_toy(lr, momentum, order, quiet, first, factor, count, mean):
    rate = lr * (1.0 + factor)
    gain = 1.0 - momentum * (1.0 - first)
    limit = sqrt(ratio(mean, count))
    return rate, momentum, gain, limit, order


def toy(p, g, slow, fast, peak, drift, size, rate, mu, gain, limit, order):
    d = g
    if mu != 0.0:
        slow = mu * slow + gain * g
        d = slow
    fast = 0.7 * fast + ratio(d, limit)
    d = where(absolute(fast) > limit, limit, fast)
    if order != 0.0:
        d = div(d, sqrt(size) + 0.3)
    p = p - rate * d
    return p, slow, fast


def reads_toy(rate, mu, gain, limit, order):
    return 1.0, 1.0, where(mu != 0.0, 1.0, 0.0), 1.0, 0.0, 0.0, where(order != 0.0, 1.0, 0.0)


def terms_toy(p, g, slow, fast, peak, drift, size, rate, mu, gain, limit, order):
    peak = where(absolute(g) > peak, absolute(g), 0.9 * peak)
    size = size + g * g
    if order != 0.0:
        drift = drift + ratio(p, g)
    # The first is not zero where the streams are, as beyond the end of a tensor.
    return size, peak, drift, sqrt(peak) + ratio(g, drift) + 0.3, widen(g) * widen(p)


def reads_terms(rate, mu, gain, limit, order):
    return where(order != 0.0, 1.0, 1.0), 1.0, 0.0, 0.0, 1.0, where(order != 0.0, 1.0, 0.0), 1.0


def settle_toy(lr, momentum, order, quiet, numel, updates, count, mean, peaks, products):
    found = ratio(peaks, numel)
    if order != 0.0:
        found = found + 0.2 * sqrt(absolute(products))
    first = where(count < 0.5, 1.0, 0.0)
    factor = where(found > mean, 0.1, 0.7)
    return first, factor, count + where(updates != 0.0, 1.0, 0.1), 0.6 * mean + 0.4 * found


def settled_toy(lr, momentum, order, quiet, count, mean):
    return where(quiet > 0.8, 1.0, 0.0)


TOY = Rule(
    name="toy",
    hyper=("lr", "momentum", "order", "quiet"),
    scalars=("rate", "mu", "gain", "limit", "order"),
    derive=derive_toy,
    states=(
        State("slow", when="momentum"),
        State("fast"),
        State("peak"),
        State("drift", when="order"),
        State("size"),
    ),
    tensor_scalars=("first", "factor"),
    kept=(
        # An absent number reads as 0.1, which is no float32.
        Kept("count", initial=0.1, dtype="float64", when="momentum"),
        Kept("mean", initial=1.5, dtype="float64"),
    ),
    update=toy,
    reads=reads_toy,
    writes=("slow", "fast"),
    measure=Measure(
        terms=terms_toy,
        sums=2,
        settle=settle_toy,
        settled=settled_toy,
        settles=False,
        writes=("size", "peak", "drift"),
        reads=reads_terms,
    ),
    formula="p = p - lr (1 + factor) min(fast, limit)",
    source="none",
)


def derive_mask(on, first):
    return (on,)


def add_up(p, g, a, b, on):
    return p + g + a + b, a, b


def reads_some(on):
    return 1.0, where(on != 0.0, 0.0, 1.0), on, 0.0


SPY = Rule(
    name="spy",
    hyper=("on",),
    scalars=("on",),
    derive=derive_mask,
    states=(State("a"), State("b")),
    update=add_up,
    reads=reads_some,
    writes=("a", "b"),
    formula="p = p + g + a + b, of those that it says are read",
    source="none",
)

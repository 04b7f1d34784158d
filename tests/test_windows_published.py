"""Learning-rate windows with compat="v1": the published stepping, and what "fixed" mends of it."""

import itertools
import math

import pytest

from fused_momentum.windows import ORDERS, SHAPES, Window


class Published:
    """The window of one tensor as published: it counts, restarts and pops as it is stepped."""

    def __init__(self, rcm, inseq, x, n, m, tau, spe, cfact, e):
        self.rcm, self.inseq, self.x, self.n, self.m = rcm, inseq, x, n, m
        self.tau, self.cfact, self.e = tau, cfact, e
        self.length = {0: tau, 2: spe}.get(cfact, tau * spe)
        self.stairs = cfact if cfact > 2 else 1
        self.t = self.k = self.q = 0
        self.values, self.popped, self.f = [], 0, None

    def step(self):
        self.t += 1
        new_epoch = self.t % self.tau == 1
        self.k += new_epoch
        if self.rcm == 0:
            return 1.0
        if self.inseq:
            if self.cfact != 0 or new_epoch:
                self.f = self.pop()
            return self.f
        return self.uniform()

    def uniform(self):
        length, x, e = self.length, self.x, self.e
        idx = (self.k if self.cfact == 0 else self.t) - 1 - self.q
        phi = idx / length if idx >= 0 else (self.q - 1) / length
        if self.m == 0:
            phi = abs(2 * phi - 1)
        if phi < e or e == 1:
            return 1.0
        phi = (phi - e) / (1 - e)
        f = x + (1 - x) * self.shape(phi)
        if idx == length - 1:
            self.q += length
        return f

    def pop(self):
        if self.popped % self.length == 0:
            self.values = self.sequence()
        self.popped += 1
        return self.values.pop(0)

    def sequence(self):
        halves = 1 if self.m else 2
        span = self.length if self.m else self.length / 2
        flat = int(self.e * span)
        gen = int(span - flat)
        if halves * (gen + flat) < self.length:
            flat += 1
        if self.rcm == 2:
            gen = self.length
        weyl = (math.sqrt(5) - 1) / 2
        points = [j * weyl - math.floor(j * weyl) for j in range(gen)]
        falling = sorted((self.x + (1 - self.x) * self.shape(p) for p in points), reverse=True)
        ones = [1.0] * flat
        return ones + falling if self.m else falling[::-1] + ones + ones + falling

    def shape(self, phi):
        n, stairs = self.n, self.stairs
        if self.rcm == 2:
            return (1 - phi) ** n
        if self.rcm == 5:
            s = [self.logistic(at) for at in (phi, 0, 1)]
            return (s[0] - s[2]) / (s[1] - s[2])
        i = max(1, math.ceil(stairs * phi))
        u = stairs * phi - i + 1
        if self.rcm == 1:
            z = math.cos(math.pi * u / 2) ** n
        elif self.rcm == 3:
            z = (n**u - n) / (1 - n)
        elif self.rcm == 4:
            z = (1 - u**n) ** 2
        else:
            high, low = 1 / (1 + 2**-n), 1 / (1 + 2**n)
            z = (1 / (1 + 2 ** (2 * n * (u - 7 / 8))) - low) / (high - low)
        return (stairs - i + z) / stairs

    def logistic(self, phi):
        m, n = self.stairs, self.n
        exponents = [2 * m * n * (phi - (j + 1 / 2) / m) for j in range(m)]
        return sum(1 / (1 + (2**x if x < 1024 else math.inf)) for x in exponents) / m


RCMS = range(1, len(SHAPES))
CFACTS = (0, 1, 2, 3, 5)
POWERS = {3: (0.3, 0.01)}
ENTRIES = {
    "x": (0, 0.125),
    "m": (1, 0),
    # (tau, spe): even and odd windows, one that is all one epoch, epochs that v1 gets right
    "lengths": ((2, 3), (3, 2), (4, 4), (5, 1), (3, 5), (1, 4)),
    "e": (0, 0.3, 0.9, 1),
}


def tuples(rcm, inseq, cfact):
    for x, m, (tau, spe), e in itertools.product(*ENTRIES.values()):
        for n in POWERS.get(rcm, (2, 3)):
            if cfact != 0 or tau >= 2:
                yield rcm, inseq, x, n, m, tau, spe, cfact, e


def steps_of(window, windows=4):
    """Some windows' worth of steps."""
    return range(1, windows * window.length * window._steps_per_count + 1)


cases = [
    pytest.mark.parametrize("cfact", CFACTS),
    pytest.mark.parametrize("inseq", (0, 1), ids=ORDERS),
    pytest.mark.parametrize("rcm", RCMS, ids=SHAPES[1:]),
]


def every_case(test):
    for mark in cases:
        test = mark(test)
    return test


@every_case
def test_v1_is_the_published_stepping_in_any_order_of_steps(rcm, inseq, cfact):
    # Equal to the last bit: both do the same operations in the same order on the same float64
    # phases; the quotients of integers behind the phases are rounded once in both.
    for rc_cfg in tuples(rcm, inseq, cfact):
        window = Window.from_rc_cfg(rc_cfg, compat="v1")
        published = Published(*rc_cfg)
        stepped = [(t, published.step()) for t in steps_of(window)]
        for t, f in reversed(stepped):
            assert window(t) == f, f"{rc_cfg} at step {t}"


@pytest.mark.parametrize(
    ("rc_cfg", "first", "values"),
    [
        # Measured on the original: second and third window's last epoch
        ((1, 0, 0, 3, 1, 3, 1, 0, 0), 17, [-0.875]),
        ((1, 0, 0, 3, 1, 3, 1, 0, 0), 26, [-1.875]),
        ((1, 0, 0, 2, 1, 8, 1, 1, 0.9), 8, [1, 0, -1.146, -2.5]),
        ((6, 0, 0, 4, 1, 8, 1, 1, 0), 1, [1.058]),
        ((6, 0, 0, 4, 1, 10**6, 1, 1, 0), 10**6, [0.311]),
    ],
)
def test_v1_gives_the_values_seen_in_the_original(rc_cfg, first, values):
    window = Window.from_rc_cfg(rc_cfg, compat="v1")
    assert [round(window(first + i), 3) for i in range(len(values))] == values


def test_v1_has_no_real_power_of_a_negative_number():
    rc_cfg = (2, 0, 0, 1.5, 1, 2, 2, 0, 0)
    published = Published(*rc_cfg)
    factors = [published.step() for _ in range(8)]
    assert isinstance(factors[7], complex)
    window = Window.from_rc_cfg(rc_cfg, compat="v1")
    assert [window(t) for t in range(1, 8)] == factors[:7]
    with pytest.raises(ValueError, match=r"power \(rc_cfg\[3\], n\) is 1.5; .*phase is 1.5"):
        window(8)


# --- what "fixed" mends -------------------------------------------------------------------------

# rc_cfg, the first values of v1 and of fixed, worked by hand to three digits.
# Weyl points: 0, 0.618, 0.236, 0.854.
MENDS = {
    "epochs by steps_per_epoch": (
        (2, 0, 0, 1, 1, 4, 2, 0, 0),
        [1, 1, 1, 1, 0.75, 0.75, 0.75, 0.75, 0.5, 0.5],
        [1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 1, 1],
    ),
    "last epoch of the second window": (
        (2, 0, 0, 1, 1, 2, 2, 0, 0),
        [1, 1, 0.5, 0.5, 1, 1, 0.5, -0.5],
        [1, 1, 0.5, 0.5, 1, 1, 0.5, 0.5],
    ),
    "flat to the end, half": (
        (2, 0, 0, 1, 1, 4, 1, 1, 0.875),
        [1, 1, 1, 1, 0, -2],
        [1, 1, 1, 1, 1, 1],
    ),
    "flat to the end, full": (
        (2, 0, 0, 1, 0, 4, 1, 1, 0.75),
        [0, 1, 1, 1, 0, -2, -4],
        [0, 1, 1, 1, 0, 1, 1],
    ),
    "flat to the end, epochs": (
        (2, 0, 0, 1, 1, 2, 2, 0, 0.75),
        [1, 1, 1, 1, 0, 0, -2, -2],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ),
    # n = 4: T = 1 / (1 + 2^(8 u - 7)) is 128/129 at 0, 8/9 at 1/2, 1/3 at 1; v1 takes 1/17 from it
    # and divides by 15/17, fixed takes 1/3 and divides by 85/129.
    "late logistic": ((6, 0, 0, 4, 1, 2, 1, 1, 0), [1.058, 0.941], [1, 0.843]),
    "kronecker polynomial, half": (
        (2, 1, 0, 1, 1, 4, 1, 1, 0.5),
        [1, 1, 1, 0.764, 1],
        [1, 1, 1, 0.382, 1],
    ),
    "kronecker polynomial, full": (
        (2, 1, 0, 1, 0, 4, 1, 1, 0),
        [0.146, 0.382, 0.764, 1, 0.146],
        [0.382, 1, 1, 0.382, 0.382],
    ),
    "kronecker, full, odd": (
        (4, 1, 0, 1, 0, 5, 1, 1, 0),
        [0.146, 1, 1, 1, 1, 0.146],
        [0.146, 1, 1, 1, 0.146, 0.146],
    ),
}


@pytest.mark.parametrize(("rc_cfg", "v1", "fixed"), MENDS.values(), ids=MENDS)
def test_each_mend(rc_cfg, v1, fixed):
    for compat, values in (("v1", v1), ("fixed", fixed)):
        window = Window.from_rc_cfg(rc_cfg, compat=compat)
        assert [round(window(t), 3) for t in range(1, len(values) + 1)] == values, compat


def slips(window):
    """Whether the published arithmetic has one of its slips in this window."""
    odd = not window.half and window.length % 2
    last = 1 - (1 if window.half else 2) / window.length
    return (
        window.shape == "logistic_late"
        or (window.unit == "epochs" and window.epochs != window.steps_per_epoch)
        or (window.order == "uniform" and (window.unit == "epochs" or last < window.flat < 1))
        or (window.order == "kronecker" and (window.shape == "polynomial" or odd))
    )


@pytest.mark.parametrize("cfact", CFACTS)
@pytest.mark.parametrize("inseq", (0, 1), ids=ORDERS)
@pytest.mark.parametrize("rcm", RCMS[:-1], ids=SHAPES[1:-1])
def test_fixed_is_v1_where_no_slip_is_involved(rcm, inseq, cfact):
    compared = 0
    for rc_cfg in tuples(rcm, inseq, cfact):
        window, v1 = (Window.from_rc_cfg(rc_cfg, compat=compat) for compat in ("fixed", "v1"))
        if not slips(window):
            steps = steps_of(v1)
        elif not inseq and cfact == 0 and window.epochs == window.steps_per_epoch:
            steps = steps_of(v1, windows=1)  # the slip waits for the second window
        else:
            continue
        assert [window(t) for t in steps] == [v1(t) for t in steps], window
        compared += 1
    assert compared or (rcm == 2 and inseq)


@every_case
def test_tuple_and_back(rcm, inseq, cfact):
    for rc_cfg in tuples(rcm, inseq, cfact):
        window = Window.from_rc_cfg(rc_cfg)
        assert window.rc_cfg == rc_cfg
        assert Window.from_rc_cfg(list(window.rc_cfg)) == window
        assert eval(repr(window)) == window

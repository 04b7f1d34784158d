"""Learning-rate windows: factors of the learning rate, as pure functions of the step."""

from __future__ import annotations

import functools
import math
import operator
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

# The place of a name is its code in the published tuple: rcm, inseq, and cfact up to 2.
SHAPES = (
    "constant",
    "raised_cosine",
    "polynomial",
    "exponential",
    "simple_polynomial",
    "logistic_mid",
    "logistic_late",
)
ORDERS = ("uniform", "kronecker")
UNITS = ("epochs", "steps", "one_epoch")
# The published tuple, and what its entries are called here; cfact says the stairs too.
RC_CFG = ("rcm", "inseq", "x", "n", "m", "tau", "spe", "cfact", "e")
FIELDS = "shape order minimum power half epochs steps_per_epoch unit flat"

GOLDEN = (math.sqrt(5) - 1) / 2


def _refusal(field: str, value: object, needed: str) -> str:
    entries = dict(zip(FIELDS.split(), enumerate(RC_CFG), strict=True))
    entries["stairs"] = entries["unit"]
    entry = " (rc_cfg[{}], {})".format(*entries[field]) if field in entries else ""
    return f"Window: {field}{entry} is {value!r}; needed: {needed}"


def _check(field: str, value: Any, kind: type, needed: str, valid: Callable[[Any], bool]) -> Any:
    if not isinstance(value, kind):
        raise TypeError(_refusal(field, value, needed))
    if not valid(value):
        raise ValueError(_refusal(field, value, needed))
    return value


def _name(field: str, value: object, names: tuple[str, ...]) -> str:
    return _check(field, value, str, "one of " + ", ".join(map(repr, names)), names.__contains__)


def _integer(field: str, value: object, low: int, high: float = inf) -> int:
    needed = f"an integer from {low} to {high}" if high < inf else f"an integer of {low} or more"
    return int(_check(field, value, Integral, needed, lambda i: low <= i <= high))


def _fraction(field: str, value: object) -> float:
    return float(_check(field, value, Real, "a number from 0 to 1", lambda x: 0 <= x <= 1))


def _power(shape: str, value: object) -> float:
    low, high = {"constant": (-inf, inf), "exponential": (0, 1)}.get(shape, (0, inf))
    needed = f"for {shape}, a number above {low} and below {high}"
    return float(_check("power", value, Real, needed, lambda n: low < n < high))


def _sigmoid(x: float) -> float:
    """1 / (1 + 2^x), and nearly 0 where 2^x has no float64."""
    return 1 / (1 + 2.0 ** min(x, 1023.0))


@dataclass(frozen=True)
class Window:
    r"""Factor of the learning rate at step t = 1, 2, ...: it falls along a shape and starts again.

    ::

        i   = floor((t - 1) / s) mod L      s = steps_per_epoch if unit is "epochs", else 1
        phi = i / L                         in a full window: |2 i / L - 1|
        f_t = 1                             where phi < flat or flat = 1, and elsewhere
        f_t = minimum + (1 - minimum) shape((phi - flat) / (1 - flat))

    A half window starts at 1 and falls; its last phase is (L - 1) / L, so ``minimum`` itself is
    never reached. A full window starts at ``minimum``, rises to 1 in the middle and falls. The
    shape is (M - r + z(u)) / M: M = ``stairs`` of equal height, r = max(1, ceil(M phi)) the stair,
    u = M phi - r + 1 the phase on it, and with n = ``power``:

    ===================  ===========================================================================
    constant             f_t = 1; no other field matters
    raised_cosine        z = cos(pi u / 2)^n; n = 2 is cosine annealing
    polynomial           shape = (1 - phi)^n, without stairs
    exponential          z = (n^u - n) / (1 - n)
    simple_polynomial    z = (1 - u^n)^2
    logistic_mid         shape = (S(phi) - S(1)) / (S(0) - S(1)), whose stairs are the terms of
                         S(phi) = sum over j < M of 1 / (1 + 2^(2 M n (phi - (j + 1/2) / M))) / M
    logistic_late        z = (T(u) - T(1)) / (T(0) - T(1)), T(u) = 1 / (1 + 2^(2 n (u - 7/8)))
    ===================  ===========================================================================

    Args:
        shape: one of the names above (published code ``rcm``: 0 to 6 in this order).
        minimum: fraction of the learning rate that the window falls to, 0 to 1 (``x``).
        power: n, above 0; of the exponential also below 1 (``n``).
        half: whether the window only falls (``m`` 1), or rises first (``m`` 0).
        epochs: in a window, 1 or more (``tau``); at least 2 steps in all.
        steps_per_epoch: 1 or more (``spe``).
        unit: what is counted, and how far: "steps", L = epochs * steps_per_epoch (``cfact`` 1);
            "one_epoch", steps with L = steps_per_epoch (``cfact`` 2); "epochs", L = epochs, 2 or
            more: the factor changes once an epoch (``cfact`` 0).
        stairs: M, 1, or 3 or more with unit "steps" (``cfact`` above 2).
        flat: fraction of the window, 0 to 1, in which the factor stays 1 (``e``).
        order: "uniform", or "kronecker" (``inseq`` 1): the shape at the points frac(j c), c =
            (sqrt(5) - 1) / 2, j = 0, 1, ..., sorted. Of L points (L / 2 for each half of a full
            window) the fraction ``flat``, rounded down, is 1; in a full window of odd length the
            one in the middle too.
        compat: "fixed", or "v1": the published arithmetic, with these slips, mended in "fixed":

            * unit "epochs": the epoch advances every ``epochs`` steps, not ``steps_per_epoch``.
              Mended: the factor changes at the true end of an epoch.
            * unit "epochs", uniform, from the second window on: in the last epoch of a window all
              steps but the first have a phase above 1, so a factor below ``minimum``, mostly
              negative. Mended: all steps of that epoch have the phase (L - 1) / L.
            * flat above (L - 1) / L, in a full window above 1 - 2 / L: the window never restarts,
              and its phase grows past 1. Mended: it restarts, as every other.
            * logistic_late divides by the constants of logistic_mid: for n = 4 it starts at 1.058
              and ends near 0.311. Mended: 1 to 0.
            * kronecker: polynomial draws L points however many are needed, so with a flat top a
              half window does not reach its end, and a full one only rises; a full window of odd
              length has one value too many and loses its last. Mended: L values in all.

    A polynomial in v1 has no real value past phase 1 unless n is an integer, and raises there.
    Errors name the field, what was given and what is needed: TypeError or ValueError.

    Source: ``rc_cfg`` of AutoSGM (ICASSP 2024); cosine: Loshchilov and Hutter 2017, equation 5.

    >>> window = Window("raised_cosine", epochs=2, steps_per_epoch=2)
    >>> [round(window(t), 3) for t in (1, 2, 3, 4, 5)]
    [1.0, 0.854, 0.5, 0.146, 1.0]
    """

    shape: str = "constant"
    minimum: float = 0.0
    power: float = 2.0
    half: bool = True
    epochs: int = 1000
    steps_per_epoch: int = 1
    unit: str = "steps"
    stairs: int = 1
    flat: float = 0.0
    order: str = "uniform"
    compat: str = "fixed"

    def __post_init__(self) -> None:
        checked = {
            "shape": _name("shape", self.shape, SHAPES),
            "minimum": _fraction("minimum", self.minimum),
            "power": _power(self.shape, self.power),
            "half": _check("half", self.half, bool, "True or False", lambda _: True),
            "epochs": _integer("epochs", self.epochs, 2 if self.unit == "epochs" else 1),
            "steps_per_epoch": _integer("steps_per_epoch", self.steps_per_epoch, 1),
            "unit": _name("unit", self.unit, UNITS),
            "stairs": _integer("stairs", self.stairs, 1),
            "flat": _fraction("flat", self.flat),
            "order": _name("order", self.order, ORDERS),
            "compat": _name("compat", self.compat, ("fixed", "v1")),
        }
        # Numbers of numpy would carry their own precision into the arithmetic.
        for field, value in checked.items():
            object.__setattr__(self, field, value)
        if self.epochs * self.steps_per_epoch < 2:
            needed = "2 or more steps in all epochs"
            raise ValueError(_refusal("steps_per_epoch", self.steps_per_epoch, needed))
        if self.stairs == 2 or (self.stairs > 1 and self.unit != "steps"):
            raise ValueError(_refusal("stairs", self.stairs, "1, or 3 or more with unit 'steps'"))
        if self.shape.startswith("logistic") and self._ends[0] == self._ends[1]:
            raise ValueError(_refusal("power", self.power, "a power with which the logistic falls"))

    @classmethod
    def from_rc_cfg(cls, rc_cfg: tuple, compat: str = "fixed") -> Window:
        """The window of a published tuple; errors name the entry: TypeError or ValueError.

        >>> Window.from_rc_cfg((1, 0, 0.1, 2, 1, 90, 400, 1, 0)).rc_cfg
        (1, 0, 0.1, 2.0, 1, 90, 400, 1, 0.0)
        """
        form = f"a tuple ({', '.join(RC_CFG)})"
        if not isinstance(rc_cfg, tuple | list):
            raise TypeError(f"rc_cfg is {rc_cfg!r}; needed: {form}")
        if len(rc_cfg) != len(RC_CFG):
            raise ValueError(f"rc_cfg has {len(rc_cfg)} entries, {rc_cfg!r}; needed: {form}")
        rcm, inseq, x, n, m, tau, spe, cfact, e = rc_cfg
        cfact = _integer("unit", cfact, 0)
        return cls(
            shape=SHAPES[_integer("shape", rcm, 0, len(SHAPES) - 1)],
            minimum=x,
            power=n,
            half=bool(_integer("half", m, 0, 1)),
            epochs=tau,
            steps_per_epoch=spe,
            unit=UNITS[cfact] if cfact <= 2 else "steps",
            stairs=cfact if cfact > 2 else 1,
            flat=e,
            order=ORDERS[_integer("order", inseq, 0, 1)],
            compat=compat,
        )

    @property
    def rc_cfg(self) -> tuple:
        """The published tuple (rcm, inseq, x, n, m, tau, spe, cfact, e)."""
        codes = SHAPES.index(self.shape), ORDERS.index(self.order)
        lengths = self.epochs, self.steps_per_epoch
        cfact = self.stairs if self.stairs > 1 else UNITS.index(self.unit)
        return *codes, self.minimum, self.power, int(self.half), *lengths, cfact, self.flat

    @functools.cached_property
    def length(self) -> int:
        """L: how many values a window has; epochs where unit is "epochs", else steps."""
        lengths = {"epochs": self.epochs, "one_epoch": self.steps_per_epoch}
        return lengths.get(self.unit, self.epochs * self.steps_per_epoch)

    def __call__(self, t: int) -> float:
        """The factor at step ``t`` = 1, 2, ...; depends on nothing but ``t`` and the fields."""
        t = operator.index(t)
        if t < 1:
            raise ValueError(f"Window: t is {t}; needed: a step, 1 or more")
        if self.shape == "constant":
            return 1.0
        count, repeat = divmod(t - 1, self._steps_per_count)
        index = count % self.length
        if self.order == "kronecker":
            return _kronecker(self)[index]
        # Published: q moves on after the first step of the last epoch, and never from a flat top.
        if self.compat == "v1" and (self._flat_end or (repeat and index == self.length - 1)):
            index = count
        phase = self._phase(index)
        if self._is_flat(phase):
            return 1.0
        return self._factor((phase - self.flat) / (1 - self.flat))

    def scheduler(self, optimizer: Optimizer, last_epoch: int = -1) -> LambdaLR:
        """A torch scheduler whose k-th ``step()`` sets every lr to its first value * f_(k + 1).

        Call its ``step()`` after each ``optimizer.step()``; the optimizer's groups change in place.

        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> Window("polynomial", power=1, epochs=4).scheduler(sgd).get_last_lr()
        [0.5]
        """
        from torch.optim.lr_scheduler import LambdaLR

        # A bound method can be pickled, and leaves the window out of the state_dict.
        return LambdaLR(optimizer, self._after, last_epoch=last_epoch)

    def _after(self, steps: int) -> float:
        return self(steps + 1)

    @functools.cached_property
    def _steps_per_count(self) -> int:
        if self.unit != "epochs":
            return 1
        return self.epochs if self.compat == "v1" else self.steps_per_epoch

    def _phase(self, index: int) -> float:
        phase = index / self.length
        return phase if self.half else abs(2 * phase - 1)

    def _is_flat(self, phase: float) -> bool:
        return phase < self.flat or self.flat == 1

    @functools.cached_property
    def _flat_end(self) -> bool:
        return self._is_flat(self._phase(self.length - 1))

    def _factor(self, phi: float) -> float:
        return self.minimum + (1 - self.minimum) * self._shape(phi)

    def _shape(self, phi: float) -> float:
        """1 at phi = 0, 0 at phi = 1."""
        n, stairs = self.power, self.stairs
        if self.shape == "polynomial":
            if phi > 1 and not n.is_integer():
                raise ValueError(_refusal("power", n, f"an integer in v1, whose phase is {phi}"))
            return (1 - phi) ** n
        if self.shape == "logistic_mid":
            first, last = self._ends
            return (self._mid(phi) - last) / (first - last)
        stair = max(1, math.ceil(stairs * phi))
        return (stairs - stair + self._on_stair(stairs * phi - stair + 1)) / stairs

    def _on_stair(self, u: float) -> float:
        n = self.power
        if self.shape == "raised_cosine":
            return math.cos(math.pi * u / 2) ** n
        if self.shape == "exponential":
            return (n**u - n) / (1 - n)
        if self.shape == "simple_polynomial":
            return (1 - u**n) ** 2
        first, last = self._ends
        return (self._late(u) - last) / (first - last)

    def _mid(self, phi: float) -> float:
        n, stairs = self.power, self.stairs
        each = (_sigmoid(2 * stairs * n * (phi - (j + 0.5) / stairs)) for j in range(stairs))
        return sum(each) / stairs

    def _late(self, u: float) -> float:
        return _sigmoid(2 * self.power * (u - 7 / 8))

    @functools.cached_property
    def _ends(self) -> tuple[float, float]:
        """What the logistic is at phi = 0 and at phi = 1."""
        if self.shape == "logistic_mid":
            return self._mid(0.0), self._mid(1.0)
        if self.compat == "v1":
            return _sigmoid(-self.power), _sigmoid(self.power)
        return self._late(0.0), self._late(1.0)


@functools.lru_cache(maxsize=16)
def _kronecker(window: Window) -> array:
    """The values of a window in Kronecker order; in v1 sometimes more than the window uses."""
    length, halves = window.length, 1 if window.half else 2
    flat = int(window.flat * (length / halves))
    drawn = int(length / halves - flat)
    ones = length - halves * drawn
    if window.compat == "v1":
        ones = halves * (flat + (halves * (drawn + flat) < length))
        drawn = length if window.shape == "polynomial" else drawn
    rising = sorted(window._factor(j * GOLDEN % 1.0) for j in range(drawn))
    before = [] if window.half else rising
    return array("d", [*before, *[1.0] * ones, *reversed(rising)])

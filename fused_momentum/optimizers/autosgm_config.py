"""The settings of AutoSGM by readable names, and the published tuples that they stand for."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields
from typing import Any, ClassVar

NUMERATORS = ("unity", "parcor", "huber_parcor", "moment", "huber_unity")


def _refusal(config: Any, field: str, value: object, needed: str) -> str:
    position = [f.name for f in fields(config)].index(field)
    return (
        f"{type(config).__name__}: {field} ({config.TUPLE}[{config.ENTRIES[position]}]) is "
        f"{value!r}; needed: {needed}"
    )


class _Config:
    """A dataclass that stands for a published tuple; ENTRIES: where each field is in the tuple."""

    TUPLE: ClassVar[str]
    FORM: ClassVar[str]
    ENTRIES: ClassVar[tuple[int, ...]]

    def _number(self, field: str, needed: str, low: float, high: float, open_high: bool) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(_refusal(self, field, value, needed))
        if not (low <= value < high if open_high else low <= value <= high):
            raise ValueError(_refusal(self, field, value, needed))
        object.__setattr__(self, field, float(value))

    def _switch(self, field: str, needed: str = "True or False") -> None:
        value = getattr(self, field)
        if value not in (False, True):
            raise TypeError(_refusal(self, field, value, needed))
        object.__setattr__(self, field, bool(value))

    @classmethod
    def of(cls, published: tuple) -> Any:
        """The settings that a published tuple stands for; errors name the entry."""
        if not isinstance(published, tuple | list):
            raise TypeError(f"{cls.TUPLE} is {published!r}; needed: a tuple {cls.FORM}")
        if len(published) != len(cls.ENTRIES):
            raise ValueError(
                f"{cls.TUPLE} has {len(published)} entries, {published!r}; "
                f"needed: a tuple {cls.FORM}"
            )
        return cls(*(published[entry] for entry in cls.ENTRIES))

    def published(self) -> tuple:
        """The published tuple."""
        values = [getattr(self, f.name) for f in fields(self)]
        return tuple(values[self.ENTRIES.index(k)] for k in range(len(values)))


@dataclass(frozen=True)
class LearningRate(_Config):
    """The learning rate: ``lr_cfg`` = (aoptlr, lr_init, num_lrc).

    Args:
        rate: mu, 0 or more.
        normalized: divide by the root of the gradient's second moment. False: constant ``rate``.
        numerator: what multiplies the normalized step, 0 to 4 or its name: "unity" (mu), "parcor"
            (correlation of weights and steps), "huber_parcor" (the same, outliers clipped),
            "moment" (of the normalized gradient), "huber_unity" (mu; outlying steps are shrunk).

    >>> LearningRate(1e-3, numerator="parcor").published()
    (True, 0.001, 1)
    """

    TUPLE: ClassVar[str] = "lr_cfg"
    FORM: ClassVar[str] = "(aoptlr, lr_init, num_lrc)"
    ENTRIES: ClassVar[tuple[int, ...]] = (1, 0, 2)

    rate: float = 1e-2
    normalized: bool = True
    numerator: int | str = 0

    def __post_init__(self) -> None:
        self._number("rate", "a number, 0 or more", 0.0, math.inf, True)
        self._switch("normalized")
        numerator = self.numerator
        if isinstance(numerator, str) and numerator in NUMERATORS:
            numerator = NUMERATORS.index(numerator)
        needed = f"0 to 4, or one of {list(NUMERATORS)}"
        if isinstance(numerator, bool) or not isinstance(numerator, numbers.Integral):
            raise TypeError(_refusal(self, "numerator", numerator, needed))
        if not 0 <= numerator <= 4:
            raise ValueError(_refusal(self, "numerator", numerator, needed))
        object.__setattr__(self, "numerator", int(numerator))


@dataclass(frozen=True)
class Smoothing(_Config):
    """The filters: ``beta_cfg`` = (beta_n, beta_a, beta_i, gamma_i, eta_i, debias).

    Args:
        pole: beta of the filter on the gradient, 0 (no smoothing) up to but not 1.
        zero: gamma of it, ``pole`` or less: 0 is heavy ball; negative smooths more.
        gain: eta, of its input; 0 stands for 1 - pole, for the second moment's filter too.
        debias: divide by the sum of the weights so far, in both filters.
        moment_pole: beta of the filter on the squared gradient, 0 up to but not 1.
        numerator_pole: beta of the filters of the numerator, 0 up to but not 1.

    >>> Smoothing.nesterov(0.5).zero
    0.3333333333333333
    """

    TUPLE: ClassVar[str] = "beta_cfg"
    FORM: ClassVar[str] = "(beta_n, beta_a, beta_i, gamma_i, eta_i, debias)"
    ENTRIES: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 1, 0)

    pole: float = 0.9
    zero: float = 0.0
    gain: float = 0.0
    debias: bool = True
    moment_pole: float = 0.999
    numerator_pole: float = 0.9999

    def __post_init__(self) -> None:
        for field in ("pole", "moment_pole", "numerator_pole"):
            self._number(field, "a number from 0 up to, but not, 1", 0.0, 1.0, True)
        needed = f"a finite number, {self.pole} (pole) or less"
        self._number("zero", needed, -1e300, self.pole, False)
        self._number("gain", "a number, 0 or more", 0.0, math.inf, True)
        self._switch("debias")

    @classmethod
    def nesterov(cls, pole: float = 0.9, **more: Any) -> Smoothing:
        """The filter of Nesterov's method: zero = pole / (1 + pole)."""
        return cls(pole, pole / (1.0 + pole), **more)


@dataclass(frozen=True)
class WeightDecay(_Config):
    """The weight decay: ``wd_cfg`` = (wd_cte, wd_lvl).

    Args:
        rate: lambda, 0 or more.
        decoupled: False (level 0) adds lambda w to the gradient, and so to both its moments. True
            (level 1) adds (1 - pole) / (1 - zero) lambda w to the step.

    >>> WeightDecay(0.1, decoupled=True).published()
    (0.1, 1)
    """

    TUPLE: ClassVar[str] = "wd_cfg"
    FORM: ClassVar[str] = "(wd_cte, wd_lvl)"
    ENTRIES: ClassVar[tuple[int, ...]] = (0, 1)

    rate: float = 0.0
    decoupled: bool = False

    def __post_init__(self) -> None:
        self._number("rate", "a number, 0 or more", 0.0, math.inf, True)
        self._switch("decoupled", "0 or 1")

    def published(self) -> tuple:
        return self.rate, int(self.decoupled)

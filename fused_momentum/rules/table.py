"""What a row of the rule table says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class State:
    """A tensor kept per parameter, of the parameter's shape: ``optimizer.state[p][name]``.

    ``when`` names a hyper-parameter: the state exists only in groups where that is not zero.
    """

    name: str
    when: str | None = None


@dataclass(frozen=True)
class Kept:
    """A number kept per parameter, on its device: ``optimizer.state[p][name]``, a 0-dim tensor."""

    name: str
    initial: float = 0.0
    dtype: str = "float32"  # or "float64"; the same for all of a rule
    when: str | None = None


@dataclass(frozen=True)
class Measure:
    """A pass before the update: terms are summed over each tensor, and numbers follow from them.

    ``terms(p, g, *states, *scalars)`` is elementwise and returns ``(*states it writes, *terms)``;
    the last ``sums`` of these are the terms, and ``writes`` names the states. They are summed in
    float64, in an order that is part of the definition (``reference.tensor_sum``). Then
    ``settle(*hyper, numel, updates, *kept, *sums)`` returns the ``(*tensor_scalars, *kept)`` of the
    step, in float64; ``updates`` is 0 where no update follows. ``settled(*hyper, *kept)`` is not 0
    for a tensor that has nothing to measure: for it none of this happens. With ``settles`` that
    depends on the kept numbers, and a tensor that is settled stays so; else on ``hyper`` alone.
    """

    terms: Callable[..., tuple]
    sums: int
    settle: Callable[..., tuple]
    settled: Callable[..., float]
    settles: bool = True
    writes: tuple[str, ...] = ()
    reads: Callable[..., tuple] | None = None


STEP = "step"  # where state[p] counts the steps, for a rule that depends on their number


@dataclass(frozen=True)
class Rule:
    """One row of the table: how a rule is called, and what it needs.

    ``hyper``: keys of a parameter group, in the order in which ``derive`` takes them; after them
    ``derive`` takes the ``tensor_scalars``, numbers that hold for one step of one tensor, and the
    ``kept``. ``choices``: the words that a key may have for a value; the rule gets their number.
    ``scalars``: what ``derive`` returns. ``update(p, g, *states, *scalars)`` returns ``(p,
    *states)``, or p and those states that ``writes`` names. ``reads(*scalars)`` returns for p, g
    and each state whether ``update`` reads it (None: it reads all). ``worked`` holds steps done by
    hand, as a test: hyper-parameters, then per step ``(g, p, *states)``.

    A rule that depends on the number of the step has ``read(group, t)``: it returns the values of
    ``hyper`` for a tensor that takes its step t = 1, 2, ... ; ``state[p][STEP]`` counts them.
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
    kept: tuple[Kept, ...] = ()
    measure: Measure | None = None
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    read: Callable[[dict, int], tuple[float, ...]] | None = None
    reads: Callable[..., tuple] | None = None
    writes: tuple[str, ...] | None = None
    worked: tuple = ()

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the states that ``update`` writes."""
        return tuple(s.name for s in self.states) if self.writes is None else self.writes

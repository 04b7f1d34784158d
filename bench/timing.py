"""Interleaved timing: drift of the machine falls on all contestants alike and cancels in ratios."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

MICRO = 1e-3  # microseconds in a nanosecond
TURN_US, TURN_STEPS = 2000, 50  # short steps are timed many times in a turn
WARM_UPS = 3  # of a short step: the first ones find caches cold, and would make its turns short
TURN_SHARE = 0.1  # of the slowest contestant's step
MIN_ROUNDS, MAX_ROUNDS = 5, 60
SLOW, SLOW_ROUNDS = 10, 2


def nothing() -> None:
    """Do nothing; the default preparation of a step."""


@dataclass
class Contestant:
    """One timed step function; times in microseconds, one inner list per turn."""

    key: tuple
    step: Callable[[], object]
    prepare: Callable[[], object] = nothing  # before each step, not timed
    total: list[list[float]] = field(default_factory=list)
    host: list[list[float]] = field(default_factory=list)

    def quantiles(self, which: str = "total") -> tuple[float, float, float]:
        """p20, p50 and p80 over all steps of all turns."""
        return tuple(np.quantile(np.concatenate(getattr(self, which)), (0.2, 0.5, 0.8)))

    def cold(self) -> float:
        """Median over the first steps of the turns: the others have just used the caches."""
        return float(np.median([turn[0] for turn in self.total]))

    def warm_up(self, clock) -> float:
        """Microseconds of a step when it has been taken before."""
        us = max(clock.time(self.step, self.prepare))
        again = range(WARM_UPS - 1) if us < TURN_US else ()
        return min([us, *(max(clock.time(self.step, self.prepare)) for _ in again)])

    def take_turn(self, clock, steps: int = 1) -> None:
        """Time some steps, each alone."""
        turn = [clock.time(self.step, self.prepare) for _ in range(steps)]
        self.host.append([host for host, _ in turn])
        self.total.append([total for _, total in turn])


class CpuClock:
    """On a CPU a step is done when it returns."""

    def time(self, step, prepare=nothing) -> tuple[float, float]:
        """Microseconds until `step` returns, and until it is done."""
        prepare()
        start = time.perf_counter_ns()
        step()
        microseconds = (time.perf_counter_ns() - start) * MICRO
        return microseconds, microseconds


class CudaClock:
    """Time until the call returns, and device time between two events on an idle device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, step, prepare=nothing) -> tuple[float, float]:
        """Microseconds until `step` returns, and until it is done."""
        prepare()
        torch.cuda.synchronize(self.device)
        self.start.record()
        begin = time.perf_counter_ns()
        step()
        host = (time.perf_counter_ns() - begin) * MICRO
        self.end.record()
        torch.cuda.synchronize(self.device)
        return host, self.start.elapsed_time(self.end) * 1e3


def clock_of(device: torch.device) -> CpuClock | CudaClock:
    """The clock for a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleave(contestants: list[Contestant], clock, deadline: float, tick=nothing) -> int:
    """Turns in rounds (A B C, B C A, ...) until `deadline`; returns the number of rounds.

    `deadline` is on `time.monotonic`. At least `MIN_ROUNDS`, at most `MAX_ROUNDS`; one that is
    `SLOW` times slower than the fastest, and too slow for its share, drops out after `SLOW_ROUNDS`.
    A turn repeats short steps; each is timed alone. Steps to warm up go before.
    """
    warm = {contestant.key: contestant.warm_up(clock) for contestant in contestants}
    turn_us = max(TURN_US, TURN_SHARE * max(warm.values()))
    steps = {key: int(np.clip(turn_us / us, 1, TURN_STEPS)) for key, us in warm.items()}
    share_us = (deadline - time.monotonic()) / MICRO**2 / len(contestants) / MIN_ROUNDS
    slow = {k for k, us in warm.items() if us > max(share_us, SLOW * min(warm.values()))}
    rounds = 0
    gc.collect()
    gc.disable()
    try:
        while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.monotonic() < deadline):
            first = rounds % len(contestants)
            for contestant in contestants[first:] + contestants[:first]:
                if rounds < SLOW_ROUNDS or contestant.key not in slow:
                    contestant.take_turn(clock, steps[contestant.key])
            rounds += 1
            tick()
    finally:
        gc.enable()
    return rounds


def ratio(slow: Contestant, fast: Contestant) -> tuple[float, float, float]:
    """p20, p50 and p80 of (median time of `slow` / median time of `fast`) over their rounds."""
    pairs = zip(slow.total, fast.total, strict=False)  # one may have dropped out
    return tuple(np.quantile([np.median(a) / np.median(b) for a, b in pairs], (0.2, 0.5, 0.8)))


def host_ratio(slow: Contestant, fast: Contestant) -> float:
    """The median ratio of the times until the call returns."""
    pairs = zip(slow.host, fast.host, strict=False)
    return float(np.median([np.median(a) / np.median(b) for a, b in pairs]))

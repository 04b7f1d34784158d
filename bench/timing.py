"""Interleaved timing: drift of the machine falls on all contestants alike and cancels in ratios."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

MICRO = 1e-3  # microseconds in a nanosecond
TURN_US, TURN_STEPS = 2000, 50  # short steps are timed many times in a turn
TURN_SHARE = 0.1  # of the slowest contestant's step
MIN_ROUNDS, MAX_ROUNDS = 5, 60


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


class CpuClock:
    """On a CPU a step is done when it returns."""

    def time(self, contestant: Contestant) -> tuple[float, float]:
        contestant.prepare()
        start = time.perf_counter_ns()
        contestant.step()
        microseconds = (time.perf_counter_ns() - start) * MICRO
        return microseconds, microseconds


class CudaClock:
    """Time until the call returns, and device time between two events, with a cold L2.

    Untested on a GPU so far.
    """

    def __init__(self, device: torch.device):
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.device, self.flush = device, torch.empty(4 * l2, dtype=torch.uint8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, contestant: Contestant) -> tuple[float, float]:
        contestant.prepare()
        self.flush.zero_()
        torch.cuda.synchronize(self.device)
        self.start.record()
        begin = time.perf_counter_ns()
        contestant.step()
        host = (time.perf_counter_ns() - begin) * MICRO
        self.end.record()
        torch.cuda.synchronize(self.device)
        return host, self.start.elapsed_time(self.end) * 1e3


def clock_of(device: torch.device) -> CpuClock | CudaClock:
    """The clock for a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleave(contestants: list[Contestant], clock, deadline: float, tick=nothing) -> int:
    """Turns in rounds (A B C, B C A, ...) until `deadline`; returns the number of rounds.

    `deadline` is on `time.monotonic`. At least `MIN_ROUNDS`, at most `MAX_ROUNDS`.
    A turn repeats short steps; each is timed alone. A step to warm up goes before.
    """
    warm = {contestant.key: max(clock.time(contestant)) for contestant in contestants}
    turn_us = max(TURN_US, TURN_SHARE * max(warm.values()))
    steps = {key: int(np.clip(turn_us / us, 1, TURN_STEPS)) for key, us in warm.items()}
    rounds = 0
    gc.collect()
    gc.disable()
    try:
        while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.monotonic() < deadline):
            first = rounds % len(contestants)
            for contestant in contestants[first:] + contestants[:first]:
                turn = [clock.time(contestant) for _ in range(steps[contestant.key])]
                contestant.host.append([host for host, _ in turn])
                contestant.total.append([total for _, total in turn])
            rounds += 1
            tick()
    finally:
        gc.enable()
    return rounds


def ratio(slow: Contestant, fast: Contestant) -> tuple[float, float, float]:
    """p20, p50 and p80 over the rounds of (median time of `slow` / median time of `fast`)."""
    pairs = zip(slow.total, fast.total, strict=True)
    return tuple(np.quantile([np.median(a) / np.median(b) for a, b in pairs], (0.2, 0.5, 0.8)))

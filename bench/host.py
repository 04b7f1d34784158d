"""Cost of a step against the number of tensors, at one element each: what is left is host work."""

import time
from itertools import cycle

import numpy as np
import torch

from bench import providers
from bench.providers import BASELINES, FUSED, OURS, Arena
from bench.step import enter, heading
from bench.timing import Contestant, clock_of, interleave, nothing

COUNTS = (10, 30, 100, 300, 1000, 3000, 10_000)


def new_gradients(arena: Arena):
    """A preparation that gives every parameter a gradient at another address than last time."""
    others = [grad.clone() for grad in arena.grads]
    sets = cycle([others, arena.grads])

    def prepare() -> None:
        for param, grad in zip(arena.params, next(sets), strict=True):
            param.grad = grad

    return prepare


def entries(count: int, device: torch.device, backend: str) -> dict[str, Contestant]:
    """All providers with gradients that stay, and two whose gradients are new at every step."""

    def arena() -> Arena:
        return providers.build([(1,)] * count, torch.float32, device)

    shared = arena()
    entered = {name: enter(name, shared, backend) for name in (OURS, *BASELINES)}
    for name in (OURS, FUSED):
        own = arena()
        entered[f"{name}, new grads"] = enter(name, own, backend, new_gradients(own))
    timed = {name: entry.contestant for name, entry in entered.items() if entry.contestant}
    for name, contestant in timed.items():
        contestant.key = (name,)
    return timed


def run_host(device: torch.device, seconds: float, backend: str = "auto", tick=nothing):
    """Rows of host.csv: host time at each count, with the fitted line of its provider."""
    rows, begin = [], time.monotonic()
    for done, count in enumerate(COUNTS, 1):
        timed = entries(count, device, backend)
        deadline = begin + seconds * done / len(COUNTS)
        interleave(list(timed.values()), clock_of(device), deadline, tick)
        for name, contestant in timed.items():
            p20, p50, p80 = contestant.quantiles("host")
            head = heading(f"{count}x1", [(1,)] * count, torch.float32, name, "ok")
            rows.append(head | {"us_p20": p20, "us_p50": p50, "us_p80": p80})
    for name in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == name]
        slope, intercept = fit([r["tensors"] for r in mine], [r["us_p50"] for r in mine])
        for row in mine:
            row |= {"ns_per_tensor": slope * 1e3, "intercept_us": intercept}
    return rows


def fit(counts: list[int], times: list[float]) -> tuple[float, float]:
    """Slope and intercept of times = slope * counts + intercept, least relative squares."""
    return tuple(np.polyfit(counts, times, 1, w=1 / np.asarray(times)))

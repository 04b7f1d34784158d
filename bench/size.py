"""Cost of a step against the number of tensors and against the number of parameters."""

import time
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch

from bench import arena, memory, providers
from bench.arena import Arena
from bench.cases import Shapes, numel, uniform
from bench.counts import device_work, launches
from bench.providers import FUSED, OURS, RULES, Provider
from bench.step import Entry, enter, heading
from bench.stream import Stream
from bench.timing import MIN_ROUNDS, Contestant, clock_of, interleave, nothing, ratio

COUNTS = (10, 30, 100, 300, 1000, 3000, 10_000)
TOTAL = 10**6
SIZES = (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8, 10**9)
TENSORS = 100
STEPS = MIN_ROUNDS + 4  # that a provider takes at least: the gate's, one to warm up, the rounds


@dataclass(frozen=True)
class Sweep:
    """Points along one axis; with `new_grads` some get gradients at other addresses each step."""

    name: str
    axis: str  # the column that grows
    points: tuple[Shapes, ...]
    share: float
    new_grads: bool = False


SWEEPS = (
    # One element each: what is left is the work of the host.
    Sweep("one element each", "tensors", tuple(uniform(n, 1) for n in COUNTS), 0.4, new_grads=True),
    Sweep("fixed total", "tensors", tuple(uniform(n, TOTAL // n) for n in COUNTS), 0.3),
    Sweep("fixed count", "elements", tuple(uniform(TENSORS, n // TENSORS) for n in SIZES), 0.3),
)


def new_gradients(arena: Arena):
    """A preparation that gives every parameter a gradient at another address than last time."""
    others = [grad.clone() for grad in arena.grads]
    sets = cycle([others, arena.grads])

    def prepare() -> None:
        for param, grad in zip(arena.params, next(sets), strict=True):
            param.grad = grad

    return prepare


def entries(sweep: Sweep, shapes: Shapes, chosen: list[Provider], device, backend) -> dict:
    """The providers by name; where the sweep says so, two of them also with new gradients."""

    def new_arena() -> Arena:
        return arena.build(shapes, torch.float32, device)

    shared = new_arena()
    entered = {provider.name: enter(provider, [shared], backend) for provider in chosen}
    for provider in chosen if sweep.new_grads else ():
        if provider.name in (OURS, FUSED):
            own = new_arena()
            entry = enter(provider, [own], backend, new_gradients(own))
            entered[f"{provider.name}, new grads"] = entry
    for name, entry in entered.items():
        if entry.contestant:
            entry.contestant.key = (name,)
    return entered


class Walk:
    """A sweep in progress: which providers can keep up, and the time that is left."""

    def __init__(self, sweep: Sweep, chosen: list[Provider], seconds: float):
        self.sweep, self.racing = sweep, dict.fromkeys(chosen, 0.0)  # seconds of their last step
        self.deadline, self.points = time.monotonic() + seconds, len(sweep.points)
        self.size = 0

    def keep_up(self, shapes: Shapes) -> list[Provider]:
        """Those whose steps, growing in proportion, fit into the point's share; ours always."""
        size = len(shapes) if self.sweep.axis == "tensors" else numel(shapes)
        growth, self.size = size / (self.size or size), size
        share = (self.deadline - time.monotonic()) / self.points / max(len(self.racing), 1)
        fits = {p: s for p, s in self.racing.items() if p.is_ours or STEPS * growth * s <= share}
        self.racing = fits
        self.points -= 1
        return list(fits)

    def fits(self, shapes: Shapes, device: torch.device) -> bool:
        """Whether memory and, by our own last step, time suffice for a point."""
        needed = providers.bytes_needed(numel(shapes), [torch.float32], list(self.racing))
        return 1.15 * needed < memory.available(device) and self.deadline > time.monotonic()


def run_sweep(sweep: Sweep, chosen, device, stream: Stream, seconds: float, backend, tick):
    """Rows of one sweep."""
    walk, rows = Walk(sweep, chosen, seconds), []
    for shapes in sweep.points:
        racing = walk.keep_up(shapes)
        if not walk.fits(shapes, device):
            break
        share = (walk.deadline - time.monotonic()) / (walk.points + 1)
        end = time.monotonic() + max(share, 0.0)
        entered = entries(sweep, shapes, racing, device, backend)
        timed = [entry.contestant for entry in entered.values() if entry.contestant]
        ceiling = stream.contestant() if sweep.axis == "elements" else None
        interleave([*timed, ceiling] if ceiling else timed, clock_of(device), end, tick)
        for name, entry in entered.items():
            rows.append(row(sweep, shapes, name, entry, device))
            if ceiling and entry.contestant:
                rows[-1] |= bandwidth(shapes, entry, ceiling, stream)
            walk.racing[entry.provider] = rows[-1].get("us_p50", 0.0) * 1e-6
        for provider in [e.provider for e in entered.values() if not e.contestant]:
            walk.racing.pop(provider, None)
    for name in dict.fromkeys(row["provider"] for row in rows):
        add_line(sweep, [r for r in rows if r["provider"] == name and r["status"] == "ok"])
    return rows


def row(sweep: Sweep, shapes: Shapes, name: str, entry: Entry, device) -> dict:
    """The CSV row of a provider at a point of a sweep."""
    case = (f"{len(shapes)}x{numel(shapes) // len(shapes)}", shapes)
    head = {"sweep": sweep.name, "unit": sweep.axis} | heading(
        case, torch.float32, name, entry.status
    )
    if entry.contestant is None:
        return head
    p20, p50, p80 = entry.contestant.quantiles()
    return head | {
        "us_p20": p20,
        "us_p50": p50,
        "us_p80": p80,
        "host_us_p50": entry.contestant.quantiles("host")[1],
        **device_work(entry.contestant.step, device),
        "launches": launches(entry.optimizer) if entry.provider.is_ours else "",
    }


def bandwidth(shapes: Shapes, entry: Entry, ceiling: Contestant, stream: Stream) -> dict:
    """Bytes a second of a provider beside those of the stream in the same rounds."""
    state = providers.state_dtypes(entry.optimizer, entry.arena.params[0])
    moved = providers.bytes_moved(numel(shapes), torch.float32, state)
    return {
        "gb_per_s": moved / (entry.contestant.quantiles()[1] * 1e3),
        "stream_gb_per_s": stream.bytes / (ceiling.quantiles()[1] * 1e3),
        "stream_share": moved / stream.bytes * ratio(ceiling, entry.contestant)[1],
    }


def add_line(sweep: Sweep, rows: list[dict]) -> None:
    """Fit time = slope * size + intercept to a provider's rows, and write it into them."""
    if len(rows) < 2:
        return
    slope, intercept = fit([row[sweep.axis] for row in rows], [row["us_p50"] for row in rows])
    for row in rows:
        row |= {"ns_per_unit": slope * 1e3, "intercept_us": intercept}


def fit(sizes: list[int], times: list[float]) -> tuple[float, float]:
    """Slope and intercept of times = slope * sizes + intercept, least relative squares."""
    return tuple(np.polyfit(sizes, times, 1, w=1 / np.asarray(times)))


def run(device, stream: Stream, seconds: float, backend="auto", peers=None, tick=nothing):
    """Rows of size.csv."""
    rows = []
    chosen = [p for p in providers.chosen(RULES["sgd"], peers) if not p.absent(device)]
    for sweep in SWEEPS:
        mine = [provider for provider in chosen if not provider.compiles]
        rows += run_sweep(sweep, mine, device, stream, seconds * sweep.share, backend, tick)
    return rows

"""One case: gate every provider, time those that pass, count what their steps do."""

import contextlib
import io
import time
from dataclasses import dataclass
from itertools import cycle
from statistics import median

import torch

from bench import arena, memory, providers
from bench.arena import Arena
from bench.budget import Budget
from bench.cases import Shapes, numel
from bench.counts import allocations, device_work, launches
from bench.gate import ANOTHER_RULE, GateError, Verdict, judge
from bench.providers import Provider, Rule, first_line
from bench.stream import Stream
from bench.timing import Contestant, clock_of, host_ratio, interleave, nothing, ratio

Case = tuple[str, Shapes]
L2_TIMES = 4  # so many last-level caches of bytes lie between two steps on the same buffers
COPIES = 64
LEAST_SECONDS = 1.0  # that a case is timed, whatever gating it took: many rounds of short steps
UNJUDGED = Verdict("", "")


@dataclass
class Entry:
    """A provider that has been through the gate; `contestant` is None if it may not be timed."""

    provider: Provider
    arena: Arena
    status: str
    optimizer: object = None
    verdict: Verdict = UNJUDGED
    contestant: Contestant | None = None
    cycled: int = 0  # bytes of parameters and gradients between two steps on the same ones


def maker(provider: Provider, backend: str):
    """The provider's constructor; ours with the back-end that was asked for."""
    if provider.is_ours:
        return lambda params: provider.make(params, backend=backend)
    return provider.make


def enter(provider: Provider, arenas: list[Arena], backend: str = "auto", prepare=nothing) -> Entry:
    """Gate `provider` on the first of `arenas`; raises GateError if it is ours and fails.

    Its step then goes round the arenas, so that a GPU finds none of them in its cache.
    """
    first, make = arenas[0], maker(provider, backend)
    if provider.compiles:
        arenas = arenas[:1]  # each would be compiled anew
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # sgd-sai reports its first step there
            optimizers = [make(arena.params) for arena in arenas]
            verdict = judge(provider, first, optimizers[0])
            for optimizer in optimizers[1:]:
                optimizer.step()
    except Exception as error:  # a peer may refuse in whatever way it likes
        if provider.is_ours:
            raise
        return Entry(provider, first, f"refused: {first_line(error)}")
    if provider.is_ours and verdict.problem:
        raise GateError(
            f"{provider.name}, {len(first.params)} tensors, {first.dtype}: {verdict.problem}"
        )
    if verdict.problem:
        return Entry(provider, first, f"void: {verdict.problem}", optimizers[0], verdict)
    status = "ok" if provider.truth else f"ok, {ANOTHER_RULE}"
    contestant = Contestant((provider.name, first.dtype), round_of(optimizers), prepare)
    cycled = sum(arena.bytes for arena in arenas)
    return Entry(provider, first, status, optimizers[0], verdict, contestant, cycled)


def round_of(optimizers: list):
    """A step of each optimizer in turn."""
    if len(optimizers) == 1:
        return optimizers[0].step
    steps = cycle([optimizer.step for optimizer in optimizers])
    return lambda: next(steps)()


def copies(device: torch.device, arena: Arena, free: float) -> int:
    """How many copies of an arena, with their states, keep a GPU's cache cold; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = -(-L2_TIMES * cache // max(arena.bytes, 1))
    return max(1, min(wanted, COPIES, int(free)))


@dataclass(frozen=True)
class Race:
    """What all cases of a rule have in common."""

    rule: Rule
    providers: list[Provider]
    device: torch.device
    stream: Stream
    backend: str = "auto"

    @property
    def ours(self) -> str:
        """The provider that the others are compared with."""
        return self.rule.ours[0].name

    def running(self) -> list[Provider]:
        """The providers that can run here."""
        return [p for p in self.providers if not p.absent(self.device)]

    def entries(self, shapes, dtypes, budget: Budget, outside: dict[str, str]) -> list[Entry]:
        """Every provider, gated, on the parameters of one case; `outside` are not run, and why."""
        needed = providers.bytes_needed(numel(shapes), dtypes, self.running())
        entries = []
        for dtype in dtypes:
            first = arena.build(shapes, dtype, self.device)
            count = copies(self.device, first, memory.available(self.device) / needed)
            arenas = [first]
            arenas += [arena.build(shapes, dtype, self.device, 2 * i) for i in range(1, count)]
            for provider in self.providers:
                reason = provider.absent(self.device) or outside.get(provider.name, "")
                reason = reason or budget.refuse(provider, shapes, len(dtypes))
                if reason:
                    entries.append(Entry(provider, first, reason))
                    continue
                with budget.compiling(provider, shapes):
                    entries.append(enter(provider, arenas, self.backend))
        return entries

    def run(self, case: Case, dtypes, budget: Budget, outside: dict[str, str], tick=nothing):
        """Rows of one case, a row for each dtype and provider, all dtypes in the same rounds."""
        end, compiled = time.monotonic() + budget.take(), budget.compiled
        entries = self.entries(case[1], dtypes, budget, outside)
        end += budget.compiled - compiled
        racing = [entry.contestant for entry in entries if entry.contestant]
        racing.append(self.stream.contestant())
        end = max(end, time.monotonic() + LEAST_SECONDS)
        interleave(racing, clock_of(self.device), end, tick)
        for entry in entries:
            if entry.contestant:
                seconds = entry.contestant.quantiles()[1] * 1e-6
                budget.learn(entry.provider, case[1], seconds)
        if not all(entry.arena.is_complete() for entry in entries):
            raise GateError(f"{case[0]}: a step has taken gradients away from the others")
        by_key = {contestant.key: contestant for contestant in racing}
        rows = [row(case, entry, by_key, self) for entry in entries]
        torch._dynamo.reset()
        return rows


def heading(case: Case, dtype: torch.dtype, provider: str, status: str) -> dict:
    """The first columns of a row."""
    name, shapes = case
    return {
        "case": name,
        "tensors": len(shapes),
        "elements": numel(shapes),
        "dtype": str(dtype).removeprefix("torch."),
        "provider": provider,
        "status": status,
    }


def row(case: Case, entry: Entry, racing: dict, race: Race) -> dict:
    """The CSV row of an entry; only the gate's figures where it was not timed."""
    provider, contestant, dtype = entry.provider, entry.contestant, entry.arena.dtype
    head = heading(case, dtype, provider.name, entry.status)
    head["version"] = "" if entry.optimizer is None else provider.version()
    gate = {"max_abs_error": entry.verdict.error, "allowed_error": entry.verdict.bound}
    if contestant is None:
        return head | gate
    optimizer, device, stream = entry.optimizer, race.device, racing[("stream",)]
    stream_bytes = race.stream.bytes
    state = providers.state_dtypes(optimizer, entry.arena.params[0])
    moved = providers.bytes_moved(numel(case[1]), dtype, state, provider.second_pass)
    p20, p50, p80 = contestant.quantiles()
    counted = allocations(contestant.step, device)
    measured = {
        "backend": optimizer.backend if provider.is_ours else "",
        "us_p20": p20,
        "us_p50": p50,
        "us_p80": p80,
        "us_cold": contestant.cold(),
        "us_first": first_step(entry, race) if race.rule.times_first else "",
        "us_first_made": first_step(entry, race, made=True) if race.rule.times_first else "",
        "host_us_p50": contestant.quantiles("host")[1],
        **device_work(contestant.step, device),
        "launches": launches(optimizer) if provider.is_ours else "",
        "bytes_moved": moved,
        "bytes_cycled": entry.cycled,
        "gb_per_s": moved / (p50 * 1e3),
        "stream_gb_per_s": stream_bytes / (stream.quantiles()[1] * 1e3),
        "stream_share": moved / stream_bytes * ratio(stream, contestant)[1],
        "allocations": counted.count,
        "peak_extra_bytes": counted.peak,
        "state_bytes": providers.state_bytes(optimizer),
    }
    return head | measured | gate | ratios(entry, racing, race.ours)


def first_step(entry: Entry, race: Race, made: bool = False) -> float | str:
    """Median time of the first step of three new optimizers: allocation of the state included.

    With `made` the state is there, of an optimizer that can make it without a gradient. Blank where
    there is no such method, or no memory for another state.
    """
    if made and not hasattr(entry.optimizer, "initialise"):
        return ""
    if memory.available(race.device) < 1.1 * providers.state_bytes(entry.optimizer):
        return ""
    times = []
    for _ in range(3):
        optimizer = maker(entry.provider, race.backend)(entry.arena.params)
        if made:
            make_states(optimizer, entry.arena)
        with contextlib.redirect_stdout(io.StringIO()):
            times.append(clock_of(race.device).time(optimizer.step)[1])
    return median(times)


def make_states(optimizer, arena: Arena) -> None:
    """Have an optimizer make the states of parameters that will have gradients, but have none."""
    for param in arena.params:
        param.grad = None
        param.requires_grad_()
    optimizer.initialise()
    for param, grad in zip(arena.params, arena.grads, strict=True):
        param.grad = grad
        param.requires_grad_(False)


def ratios(entry: Entry, racing: dict, ours: str) -> dict:
    """How many times longer a provider takes than ours, and our fp32 than our bf16."""
    contestant = entry.contestant
    name, dtype = contestant.key
    if name != ours:
        low, middle, high = ratio(contestant, racing[ours, dtype])
        return {
            "over_ours": middle,
            "over_ours_p20": low,
            "over_ours_p80": high,
            "host_over_ours": host_ratio(contestant, racing[ours, dtype]),
        }
    if dtype == torch.bfloat16 and (ours, torch.float32) in racing:
        return {"fp32_over_bf16": ratio(racing[ours, torch.float32], contestant)[1]}
    return {}

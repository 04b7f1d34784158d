"""One case: gate every provider, time those that pass, count their allocations."""

from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from bench import providers
from bench.cases import Shapes, numel
from bench.gate import GateError, Verdict, judge
from bench.memory import step_memory
from bench.providers import BASELINES, OURS, Arena
from bench.stream import Stream
from bench.timing import Contestant, clock_of, interleave, nothing, ratio


@dataclass
class Entry:
    """A provider that has been through the gate; `contestant` is None if it may not be timed."""

    provider: str
    arena: Arena
    optimizer: Optimizer | None
    verdict: Verdict
    contestant: Contestant | None


def enter(provider: str, arena: Arena, backend: str = "auto", prepare=nothing) -> Entry:
    """Gate `provider` on `arena`; raises GateError if it is ours and fails."""
    ours = provider == OURS
    try:
        optimizer = providers.make(provider, arena.params, backend)
        verdict = judge(provider, arena, optimizer)
    except RuntimeError as error:
        if ours:
            raise
        reason = f"refused: {str(error).splitlines()[0]}"
        return Entry(provider, arena, None, Verdict(float("nan"), float("nan"), reason), None)
    if ours and verdict.problem:
        raise GateError(f"{len(arena.params)} tensors, {arena.dtype}: {verdict.problem}")
    contestant = Contestant((provider, arena.dtype), optimizer.step, prepare)
    return Entry(provider, arena, optimizer, verdict, None if verdict.problem else contestant)


def run_case(
    name: str,
    shapes: Shapes,
    dtypes: list[torch.dtype],
    device: torch.device,
    stream: Stream,
    deadline: float,
    backend: str = "auto",
    tick=nothing,
) -> list[dict]:
    """Rows of one case, a row for each dtype and provider, all dtypes in the same rounds."""
    entries = []
    for dtype in dtypes:
        arena = providers.build(shapes, dtype, device)
        entries += [enter(provider, arena, backend) for provider in (OURS, *BASELINES)]
    racing = [entry.contestant for entry in entries if entry.contestant]
    racing.append(stream.contestant())
    interleave(racing, clock_of(device), deadline, tick)
    by_key = {contestant.key: contestant for contestant in racing}
    return [row(name, shapes, entry, by_key, stream.bytes, device) for entry in entries]


def heading(name: str, shapes: Shapes, dtype: torch.dtype, provider: str, status: str) -> dict:
    """The first columns of a row."""
    return {
        "case": name,
        "tensors": len(shapes),
        "elements": numel(shapes),
        "dtype": str(dtype).removeprefix("torch."),
        "provider": provider,
        "status": status,
    }


def row(name, shapes, entry: Entry, racing: dict, stream_bytes: int, device) -> dict:
    """The CSV row of an entry; only the gate's figures where it was not timed."""
    dtype, contestant, optimizer = entry.arena.dtype, entry.contestant, entry.optimizer
    status = f"void: {entry.verdict.problem}" if entry.verdict.problem else "ok"
    head = heading(name, shapes, dtype, entry.provider, status)
    gate = {"max_abs_error": entry.verdict.error, "allowed_error": entry.verdict.bound}
    if contestant is None:
        return head | gate
    state = providers.state_dtype(optimizer, entry.arena.params[0])
    moved = providers.bytes_moved(numel(shapes), dtype, state)
    p20, p50, p80 = contestant.quantiles()
    stream = racing[("stream",)]
    allocations, peak = step_memory(optimizer.step, device)
    measured = {
        "backend": providers.backend_of(entry.provider, optimizer),
        "us_p20": p20,
        "us_p50": p50,
        "us_p80": p80,
        "us_cold": contestant.cold(),
        "host_us_p50": contestant.quantiles("host")[1],
        "bytes_moved": moved,
        "gb_per_s": moved / (p50 * 1e3),
        "stream_gb_per_s": stream_bytes / (stream.quantiles()[1] * 1e3),
        "stream_share": moved / stream_bytes * ratio(stream, contestant)[1],
        "allocations": allocations,
        "peak_extra_bytes": peak,
    }
    return head | measured | gate | ratios(entry, racing)


def ratios(entry: Entry, racing: dict) -> dict:
    """How many times longer a baseline takes than ours, and our fp32 than our bf16."""
    provider, dtype = entry.contestant.key
    if provider != OURS:
        low, median, high = ratio(entry.contestant, racing[OURS, dtype])
        return {"ours_speedup": median, "ours_speedup_p20": low, "ours_speedup_p80": high}
    if dtype == torch.bfloat16 and (OURS, torch.float32) in racing:
        return {"fp32_over_bf16": ratio(racing[OURS, torch.float32], entry.contestant)[1]}
    return {}

"""Memory: what is available, what each optimizer holds and needs, what a tensor costs besides."""

import contextlib
import ctypes
import gc
import io
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.arena import build
from bench.cases import CASES, numel
from bench.counts import allocations
from bench.providers import FUSED, OURS, RULES, Provider, bytes_moved, chosen, first_line, torch_sgd

CASE = "resnet50"
NUMEL = 32  # 128 bytes in fp32: one aligned segment, so that no padding is counted
DICT_ONLY = "a dict and a view"
PER_TENSOR = (OURS, DICT_ONLY, FUSED)


def available(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now."""
    gc.collect()  # optimizers are often part of a cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


# --- each optimizer --------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """A way to use an optimizer; `state_size` are the bytes of an element of its states."""

    rule: str
    provider: Provider
    name: str = ""
    dtype: torch.dtype = torch.float32
    state_size: int = 4
    options: dict = field(default_factory=dict)


def modes(rules: list[str], peers: list[str] | None) -> list[Mode]:
    """Every provider in fp32, and our SGD and torch's in their other modes; ours first."""
    found, seen = [], set()
    for rule in rules:
        for provider in chosen(RULES[rule], peers):
            # torch's optimizers occur in several rules.
            key = (provider.name, "" if provider.module == "torch" else rule)
            if key not in seen and not provider.compiles:
                found.append(Mode(rule, provider))
                seen.add(key)
    more = [mode for mode in found if mode.rule == "sgd" and mode.provider.name in (OURS, FUSED)]
    for mode in more:
        size = 4 if mode.provider.is_ours else 2  # torch keeps states in the parameters' dtype
        found.append(Mode("sgd", mode.provider, "bf16 parameters", torch.bfloat16, size))
        if mode.provider.is_ours:
            half = {"state_dtype": torch.bfloat16}
            found += [
                Mode("sgd", mode.provider, "bf16 parameters and state", torch.bfloat16, 2, half),
                Mode("sgd", mode.provider, "flatten", options={"flatten": True}),
                Mode("sgd", mode.provider, "flatten grads", options={"flatten": "grads"}),
            ]
    return sorted(found, key=lambda mode: not mode.provider.is_ours)


def mode_row(mode: Mode, device: torch.device, reason: str = "") -> dict:
    """What the optimizer holds after two steps, and what its steps need besides for a moment."""
    shapes, provider = CASES[CASE](), mode.provider
    elements, states = numel(shapes), provider.states
    second_pass = provider.second_pass
    state_dtype = {2: torch.bfloat16, 4: torch.float32}[mode.state_size]
    head = {
        "rule": mode.rule,
        "provider": provider.name,
        "mode": mode.name,
        "case": CASE,
        "elements": elements,
        "state_per_param_on_paper": states * mode.state_size,
        "moved_per_param_on_paper": bytes_moved(1, mode.dtype, [state_dtype] * states, second_pass),
    }
    if reason := provider.absent(device) or reason:
        return head | {"status": reason}

    def train(steps: int) -> tuple:
        # Nobody else holds the gradients: flat ones replace them.
        params = [torch.full(shape, 0.1, dtype=mode.dtype, device=device) for shape in shapes]
        for param in params:
            param.grad = torch.full_like(param, 0.01)
        optimizer = provider.make(params, **mode.options)
        for _ in range(steps):
            optimizer.step()
        return params, optimizer

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # sgd-sai reports its first step there
            before, after = (allocations(lambda n=n: train(n), device) for n in (0, 2))
            _, optimizer = train(2)
            steady = allocations(optimizer.step, device)
    except Exception as error:  # a peer may refuse in whatever way it likes
        if provider.is_ours:
            raise
        return head | {"status": f"refused: {first_line(error)}"}
    held = after.left - before.left
    return head | {
        "status": "ok",
        "state_bytes": held,
        "state_per_param": held / elements,
        "step_extra_bytes": steady.peak,
        "peak_per_param": (after.peak - before.left) / elements,
    }


def mode_rows(options, device: torch.device, seconds: float, tick) -> list[dict]:
    """A row for each mode, as long as there is time."""
    rows, end = [], time.monotonic() + seconds
    for mode in modes(options.rule, options.peers):
        late = "skipped: no time left" if time.monotonic() > end else ""
        rows.append(mode_row(mode, device, late))
        tick()
    return rows


# --- each tensor -----------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in RAM, without what has been freed and is kept for later."""
    with contextlib.suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def grown_by(provider: str, tensors: int) -> int:
    """Bytes of RAM by which this process grows through `provider`'s optimizer and three steps.

    Parameters and gradients exist before. `DICT_ONLY` builds what the state of any torch optimizer
    holds at least, a dict and a view of a flat buffer for each parameter, and nothing else.
    """
    make = torch_sgd if provider == FUSED else RULES["sgd"].ours[0].make
    options = {"fused": True} if provider == FUSED else {}
    make(build([(NUMEL,)], torch.float32, torch.device("cpu")).params, **options).step()
    arena = build([(NUMEL,)] * tensors, torch.float32, torch.device("cpu"))
    before = resident()
    if provider == DICT_ONLY:
        flat = torch.zeros(NUMEL * tensors)
        views = zip(arena.params, flat.split(NUMEL), strict=True)
        kept = {param: {"momentum_buffer": view} for param, view in views}
    else:
        kept = make(arena.params, **options)
        for _ in range(3):
            kept.step()
    grown = resident() - before
    del kept
    return grown


def bytes_per_tensor(provider: str, tensors: int = 50_000) -> dict:
    """Growth of RAM per tensor beyond the 4 bytes an element of fp32 state, in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        grown = pool.submit(grown_by, provider, tensors).result()
    beyond = grown / tensors - 4 * NUMEL
    return {"provider": provider, "tensors": tensors, "bytes_per_tensor": beyond}

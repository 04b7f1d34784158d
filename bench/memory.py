"""Memory: what is available, what one step allocates, and what a tensor costs besides its state."""

import contextlib
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.providers import FUSED, OURS, build, make

NUMEL = 32  # 128 bytes in fp32: one aligned segment, so that no padding is counted
DICT_ONLY = "a dict and a view"
PROVIDERS = (OURS, DICT_ONLY, FUSED)


def available(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now."""
    if device.type == "cuda":
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


@contextlib.contextmanager
def quiet_stderr():
    """Drop what native code writes to stderr: the profiler announces itself there."""
    saved = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def step_memory(step, device: torch.device) -> tuple[int, int]:
    """Tensor allocations of one step and the peak of their bytes.

    From the allocator's own events, so allocations in C++ count too; plain malloc does not.
    """
    if device.type == "cuda":
        return _cuda_step_memory(step, device)
    with quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return sum(size > 0 for size in sizes), max(accumulate(sizes), default=0)


def _cuda_step_memory(step, device: torch.device) -> tuple[int, int]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, start = torch.cuda.memory_stats(device), torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    count = "allocation.all.allocated"
    allocations = torch.cuda.memory_stats(device)[count] - before[count]
    return allocations, torch.cuda.max_memory_allocated(device) - start


def resident() -> int:
    """Bytes of this process in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def grown_by(provider: str, tensors: int) -> int:
    """Bytes of RAM by which this process grows through `provider`'s optimizer and three steps.

    Parameters and gradients exist before. `DICT_ONLY` builds what the state of any torch optimizer
    holds at least, a dict and a view of a flat buffer for each parameter, and nothing else.
    """
    warm = build([(NUMEL,)], torch.float32, torch.device("cpu"))
    make(OURS if provider == DICT_ONLY else provider, warm.params).step()
    arena = build([(NUMEL,)] * tensors, torch.float32, torch.device("cpu"))
    before = resident()
    if provider == DICT_ONLY:
        flat = torch.zeros(NUMEL * tensors)
        views = zip(arena.params, flat.split(NUMEL), strict=True)
        kept = {param: {"momentum_buffer": view} for param, view in views}
    else:
        kept = make(provider, arena.params)
        for _ in range(3):
            kept.step()
    grown = resident() - before
    del kept
    return grown


def bytes_per_tensor(provider: str, tensors: int = 100_000) -> dict:
    """Growth of RAM per tensor beyond the 4 bytes an element of fp32 state, in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        grown = pool.submit(grown_by, provider, tensors).result()
    beyond = grown / tensors - 4 * NUMEL
    return {"provider": provider, "tensors": tensors, "bytes_per_tensor": beyond}

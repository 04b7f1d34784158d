"""What one step does, whatever the time it takes: allocations, kernels, launches."""

import contextlib
import gc
import os
from itertools import accumulate
from typing import NamedTuple

import torch


class Allocations(NamedTuple):
    """How many, the most bytes alive at a time, and the bytes that are left; of tensors only."""

    count: int
    peak: int
    left: int


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


def allocations(work, device: torch.device) -> Allocations:
    """Tensor allocations of `work()`.

    From the allocator's own events, so allocations in C++ count too; plain malloc does not.
    """
    gc.collect()  # or garbage of earlier work is freed on this one's account
    if device.type == "cuda":
        return _cuda_allocations(work, device)
    with quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = work()
    del kept
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    alive = [0, *accumulate(sizes)]
    return Allocations(sum(size > 0 for size in sizes), max(alive), alive[-1])


def _cuda_allocations(work, device: torch.device) -> Allocations:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, start = torch.cuda.memory_stats(device), torch.cuda.memory_allocated(device)
    kept = work()
    torch.cuda.synchronize(device)
    name = "allocation.all.allocated"
    count = torch.cuda.memory_stats(device)[name] - before[name]
    peak, end = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    del kept
    return Allocations(count, peak - start, end - start)


def device_work(step, device: torch.device) -> dict:
    """Kernels that a step runs on a GPU, and the time that they take together; blank elsewhere."""
    if device.type != "cuda":
        return {"kernels": "", "kernel_us": ""}
    activity = torch.profiler.ProfilerActivity
    with (
        quiet_stderr(),
        torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile,
    ):
        step()
        torch.cuda.synchronize(device)
    on_device = torch.autograd.DeviceType.CUDA
    events = [event for event in profile.events() if event.device_type == on_device]
    # torch marks the time of every optimizer's step as if it were one kernel more.
    work = [event for event in events if not event.is_user_annotation]
    kernels = [event for event in work if not event.name.startswith("Mem")]  # Memcpy, Memset
    return {"kernels": len(kernels), "kernel_us": sum(e.device_time_total for e in work)}


def launches(optimizer) -> int:
    """Launches of the update in the last step of one of our optimizers, by its plan.

    What a CUDA launch counted itself; elsewhere one for each device and set of dtypes.
    """
    walks = optimizer._plan._walks.values()
    return sum(getattr(walk, "launches", 0) or len(walk.batches()) for walk in walks)

"""Which back-end updates which tensors, and why: a choice is always a name and a reason."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

from . import native


class Backend(NamedTuple):
    """A back-end as ``fused_momentum.backends()`` lists it."""

    name: str
    available: bool
    reason: str


class Choice(NamedTuple):
    """The back-end chosen for the tensors of one device, and why."""

    name: str
    reason: str


# What "auto" tries on a kind of device, best first; anything else goes to the reference.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def _triton() -> tuple[bool, str]:
    """Whether the Triton kernels can run here, and why (not)."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed; install it with pip install triton"
    if _interpreted():
        return True, "Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return False, "there is no CUDA device"
    return True, "Triton kernels"


def _cuda() -> tuple[bool, str]:
    """Whether the CUDA kernels can run here, and why (not)."""
    extension, reason = native.load()
    if extension is None:
        return False, reason
    if not torch.backends.cuda.is_built():
        return False, "this torch is built without CUDA"
    try:
        return True, f"CUDA kernels, {extension.cuda_devices()} devices"
    except RuntimeError as error:
        return False, str(error)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _devices(name: str) -> tuple[str, ...] | None:
    """The kinds of devices that a back-end works on; None: all."""
    if name == "triton":
        return ("cpu",) if _interpreted() else ("cuda",)
    return {"reference": None, "cpu": ("cpu",), "cuda": ("cuda",)}[name]


def backends() -> list[Backend]:
    """List every back-end: its name, whether it can run here, and why (not).

    Example:
        >>> import fused_momentum
        >>> [row.name for row in fused_momentum.backends()]
        ['reference', 'cpu', 'triton', 'cuda']
    """
    extension, reason = native.load()
    cpu = f"C++ kernel, level {extension.cpu_level()}" if extension else reason
    return [
        Backend("reference", True, "plain torch, defines the truth"),
        Backend("cpu", extension is not None, cpu),
        Backend("triton", *_triton()),
        Backend("cuda", *_cuda()),
    ]


def check_request(request: str) -> None:
    """Raise where ``backend=request`` could not be met on any device."""
    if request == "auto":
        return
    rows = {row.name: row for row in backends()}
    if request not in rows:
        raise ValueError(f"backend={request!r} is not one of {['auto', *rows]}")
    if not rows[request].available:
        raise RuntimeError(f"backend={request!r} cannot be used: {rows[request].reason}")


def choose(request: str, device_type: str) -> Choice:
    """Choose the back-end for tensors on ``device_type``; an explicit request is never replaced.

    Raises RuntimeError where an explicit request cannot work on the device.
    """
    check_request(request)
    if request != "auto":
        works_on = _devices(request)
        if works_on is not None and device_type not in works_on:
            raise RuntimeError(
                f"backend={request!r} cannot update {device_type} tensors; it works on "
                f"{', '.join(works_on)}"
            )
        return Choice(request, "requested")
    rows = {row.name: row for row in backends()}
    skipped = []
    for name in PREFERENCE.get(device_type, ("reference",)):
        if rows[name].available and device_type in (_devices(name) or (device_type,)):
            return Choice(name, "; ".join(skipped) or "the fastest here")
        skipped.append(f"{name}: {rows[name].reason}")
    raise AssertionError("the reference is always available")

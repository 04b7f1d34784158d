"""Which back-end updates which tensors, and why: a choice is always a name and a reason."""

from __future__ import annotations

from typing import NamedTuple

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


# The devices each back-end works on; the reference works on all.
DEVICES = {"reference": None, "cpu": "cpu"}
# What "auto" tries on a device, best first.
PREFERENCE = {"cpu": ("cpu", "reference")}


def backends() -> list[Backend]:
    """List every back-end: its name, whether it can run here, and why (not).

    Example:
        >>> import fused_momentum
        >>> [row.name for row in fused_momentum.backends()]
        ['reference', 'cpu']
    """
    extension, reason = native.load()
    cpu = f"C++ kernel, level {extension.cpu_level()}" if extension else reason
    return [
        Backend("reference", True, "plain torch, defines the truth"),
        Backend("cpu", extension is not None, cpu),
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
        works_on = DEVICES[request]
        if works_on not in (None, device_type):
            raise RuntimeError(
                f"backend={request!r} cannot update {device_type} tensors; it works on {works_on}"
            )
        return Choice(request, "requested")
    rows = {row.name: row for row in backends()}
    skipped = []
    for name in PREFERENCE.get(device_type, ("reference",)):
        if rows[name].available:
            return Choice(name, "; ".join(skipped) or "the fastest here")
        skipped.append(f"{name}: {rows[name].reason}")
    raise AssertionError("the reference is always available")

"""From a rule to the compile-time arguments of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..rules import Rule
from .rules import twin
from .step import pass_kernel, settle_kernel
from .sums import TILE

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Pass(NamedTuple):
    """An elementwise pass of a rule."""

    name: str
    function: Callable[..., tuple]
    reads: Callable[..., tuple] | None
    settled: Callable[..., float] | None
    writes: tuple[int, ...]  # which streams
    sums: int
    warps: int  # that share a tile of float32; a float64 takes two registers
    registers: int  # that a thread may have


def update_of(rule: Rule) -> Pass:
    """The pass that updates the parameters."""
    writes = (0, *_streams(rule, rule.written))
    # Without a limit the assembler would spill registers to have more programs run at once.
    registers = 64 if len(rule.states) == 1 else 128
    return Pass("update", rule.update, rule.reads, None, writes, 0, 4, registers)


def measure_of(rule: Rule) -> Pass:
    """The pass before the update. It holds a whole tile at once, of all streams."""
    m = rule.measure
    writes = _streams(rule, m.writes)
    return Pass("measure", m.terms, m.reads, m.settled, writes, m.sums, 8, 128)


def _streams(rule: Rule, states: tuple[str, ...]) -> tuple[int, ...]:
    names = [state.name for state in rule.states]
    return tuple(2 + names.index(name) for name in states)


def pass_constants(
    rule: Rule, pass_: Pass, dtypes: tuple[torch.dtype, ...], dims: int
) -> tuple[tuple, dict[str, int]]:
    """What ``pass_kernel`` is compiled for: its constants, and the options of its launch."""
    double = dtypes[0] == torch.float64
    compute = tl.float64 if double else tl.float32
    warps = pass_.warps * (2 if double else 1)
    named = {
        "FUNCTION": twin(pass_.function, compute),
        "READS": pass_.reads and twin(pass_.reads, compute),
        "SETTLED": pass_.settled and twin(pass_.settled, tl.float64),
        "WRITES": pass_.writes,
        "SUMS": pass_.sums,
        "DERIVE": twin(rule.derive, tl.float64),
        "DTYPES": tuple(DTYPES[dtype] for dtype in dtypes),
        "COMPUTE": compute,
        "DIMS": dims,
        "VECTOR": 16 // min(dtype.itemsize for dtype in dtypes),
        "PART": TILE.value if pass_.sums else 32 * warps,
    }
    options = {"num_warps": warps, "maxnreg": pass_.registers}
    return _ordered(pass_kernel, named | _numbers(rule)), options


def settle_constants(rule: Rule) -> tuple:
    """What ``settle_kernel`` is compiled for."""
    named = {
        "SETTLE": twin(rule.measure.settle, tl.float64),
        "SETTLED": twin(rule.measure.settled, tl.float64),
        "SUMS": rule.measure.sums,
    }
    return _ordered(settle_kernel, named | _numbers(rule))


def _numbers(rule: Rule) -> dict:
    """The numbers that a rule takes for a tensor."""
    dtype = rule.kept[0].dtype if rule.kept else "float64"
    return {
        "HYPER": len(rule.hyper),
        "TENSOR_SCALARS": len(rule.tensor_scalars),
        "KEPT": DTYPES[getattr(torch, dtype)],
        "INITIAL": tuple(kept.initial for kept in rule.kept),
    }


def _ordered(kernel: triton.JITFunction, named: dict) -> tuple:
    return tuple(named[name] for name in kernel.arg_names if name in named)

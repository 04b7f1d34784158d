"""Runs checks where Triton interprets its kernels, and makes the tensors and tables for them.

Triton decides when it is imported whether kernels are interpreted, for a whole process. So that the
other tests, and torch.compile, keep the Triton that compiles, checks run in a second process.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which is not installed")
F32, F64, F16 = torch.float32, torch.float64, torch.float16
SIZES = (0, 1, 7, 1023, 1024, 1025, 10007)


@pytest.fixture(name="interpreted", scope="module")
def interpreted_fixture():
    """``interpreted(check, *args)`` runs ``check(*args)`` in a process where Triton interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(os.getpid).result()  # started, with the environment as it is now
    with pool:
        yield lambda check, *args: pool.submit(check, *args).result()


class Item(NamedTuple):
    """A tensor that is updated: its streams p, g, states (None: absent), its row, first step."""

    streams: list
    row: int
    first: bool


def randn(size, dtype):
    """Values of many magnitudes, so that sums depend on their order."""
    return (torch.randn(size) * torch.exp2(torch.randint(-6, 6, size))).to(dtype)


def rows_of(rule):
    """Hyper-parameters of three groups; in the last one every optional state is absent."""
    optional = [state.when for state in rule.states if state.when]
    rows = (0.05 + 0.9 * torch.rand(3, len(rule.hyper), dtype=F64)).tolist()
    rows[1][-1] = 0.0
    rows[2] = [0.0 if k in optional else v for k, v in zip(rule.hyper, rows[2], strict=True)]
    return rows


def items_of(rule, signature, rows, sizes=SIZES):
    param, state = signature
    items = []
    for i, size in enumerate(sizes):
        size = (size,) if isinstance(size, int) else size
        row = i % len(rows)
        hyper = dict(zip(rule.hyper, rows[row], strict=True))
        kept = [s.when is None or hyper[s.when] != 0 for s in rule.states]
        states = [randn(size, state) if keep else None for keep in kept]
        items.append(Item([randn(size, param), randn(size, param), *states], row, i % 2 == 0))
    return items


def clone(items):
    def copy(tensor):
        if tensor is None:
            return None
        # A copy with the same strides, and the same distance from 16-byte alignment.
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr() % 16 // tensor.element_size()
        memory = torch.zeros(start + max(extent, 1), dtype=tensor.dtype)
        view = memory.as_strided(tensor.shape, tensor.stride(), start)
        return view.copy_(tensor) if 0 not in tensor.stride() else tensor

    return [item._replace(streams=[copy(t) for t in item.streams]) for item in items]


def batch_of(items):
    from fused_momentum import kernels

    (batch,) = kernels.batches(
        [kernels.Item(item.streams, item.row, [float(item.first)]) for item in items]
    )
    return batch


def hyper_of(rows, multipliers):
    hyper = [[*row, scale] for row, scale in zip(rows, multipliers, strict=True)]
    return torch.tensor(hyper, dtype=F64)


def table_of(items, rows, multipliers):
    from fused_momentum.kernels import Table

    batch = batch_of(items)
    table = Table(batch.device)
    table.set_tensors(
        batch.addresses, batch.numels, batch.rows, batch.tensor_scalars, batch.layouts
    )
    table.set_hyper(hyper_of(rows, multipliers))
    return table


def dtypes_of(rule, signature):
    param, state = signature
    return (param, param, *(state for _ in rule.states))


def assert_equal(items, expected):
    for i, (item, other) in enumerate(zip(items, expected, strict=True)):
        for s, (tensor, wanted) in enumerate(zip(item.streams, other.streams, strict=True)):
            if tensor is not None:
                bits = (tensor != wanted) & ~(tensor.isnan() & wanted.isnan())
                assert not bits.any(), f"tensor {i}, stream {s}: {int(bits.sum())} elements differ"

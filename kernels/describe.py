"""From torch tensors to the tables of a launch: where they lie, in which order they are visited.

The twin of ``csrc/batch.cpp`` for installations without the extension.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """Tensors of one device with the same dtypes, as CPU tables; see ``Table.set_tensors``."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    addresses: torch.Tensor
    numels: torch.Tensor
    rows: torch.Tensor
    tensor_scalars: torch.Tensor
    kept: torch.Tensor
    layouts: torch.Tensor | None
    tensors: list[list[torch.Tensor | None]]  # what the addresses point to, kept alive


class Item(NamedTuple):
    """One tensor to update: its streams p, g, states (None: absent), scalars and kept numbers."""

    streams: Sequence[torch.Tensor | None]
    row: int
    tensor_scalars: Sequence[float]
    kept: Sequence[torch.Tensor | None] = ()


def layout_of(streams: Sequence[torch.Tensor]) -> list[list[int]]:
    """Sizes, then the strides of each stream, of real tensors of one shape.

    Elements are visited in the order of the first stream's memory; dimensions that are one run in
    every stream are merged. Empty where every stream is one contiguous run in that order.
    """
    dims = [d for d, size in enumerate(streams[0].shape) if size != 1]
    dims.sort(key=streams[0].stride, reverse=True)
    merged: list[tuple[int, list[int]]] = []
    for d in dims:
        size, strides = streams[0].shape[d], [t.stride(d) for t in streams]
        if merged and merged[-1][1] == [stride * size for stride in strides]:
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    if not merged or (len(merged) == 1 and set(merged[0][1]) == {1}):
        return []
    return [[size for size, _ in merged], *([s[i] for _, s in merged] for i in range(len(streams)))]


def host_table(values: Sequence, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A tensor on the CPU, whatever the default device is."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def table_of(layouts: Sequence[list[list[int]]], streams: int) -> torch.Tensor | None:
    """The layouts of n tensors as int64 [n, 1 + streams, dims], or None where all are empty."""
    dims = max((len(layout[0]) for layout in layouts if layout), default=0)
    if dims == 0:
        return None
    table = torch.zeros(len(layouts), 1 + streams, dims, dtype=torch.int64, device="cpu")
    for row, layout in zip(table, layouts, strict=True):
        if layout:
            row[0] = 1  # dimensions that the tensor lacks, on the outside
            row[:, dims - len(layout[0]) :] = host_table(layout)
    return table


def batches(items: Iterable[Item]) -> list[Batch]:
    """Sort tensors by device and dtypes: one launch each."""
    members: dict[tuple, list[tuple[Item, list[torch.Tensor]]]] = {}
    for item in map(Item._make, items):
        param = item.streams[0]
        streams = [param if t is None else t.resolve_conj().resolve_neg() for t in item.streams]
        if param.is_complex():
            streams = [torch.view_as_real(t) for t in streams]
        # An absent state has the type that states have by default: no launch of its own for it.
        absent = torch.float64 if streams[0].dtype == torch.float64 else torch.float32
        given = zip(item.streams, streams, strict=True)
        key = (param.device, tuple(absent if s is None else t.dtype for s, t in given))
        members.setdefault(key, []).append((item, streams))
    return [_batch(*key, group) for key, group in members.items()]


def _batch(device, dtypes, members) -> Batch:
    addresses = [
        [
            0 if given is None else t.data_ptr()
            for given, t in zip(item.streams, streams, strict=True)
        ]
        for item, streams in members
    ]
    kept = [[0 if t is None else t.data_ptr() for t in item.kept] for item, _ in members]
    layouts = [[] if streams[0].numel() == 0 else layout_of(streams) for _, streams in members]
    scalars = host_table([item.tensor_scalars for item, _ in members], torch.float64)
    return Batch(
        device,
        dtypes,
        host_table(addresses).T.contiguous(),
        host_table([streams[0].numel() for _, streams in members]),
        host_table([item.row for item, _ in members]),
        scalars.T.contiguous(),
        host_table(kept).T.contiguous(),
        table_of(layouts, len(dtypes)),
        [[*streams, *item.kept] for item, streams in members],
    )

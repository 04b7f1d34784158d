"""Sums over each tensor in float64, in an order that is part of the definition.

A tile of 1024 elements, zero padded, is summed by halving: x[i] += x[i + h], h = 512, 256, ... 1.
Lane j of 1024 then adds the sums of a tensor's tiles j, j + 1024, ... in that order to 0, and the
lanes are halved in the same way. Every back-end keeps to it: sums are the same bits on all.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .launch import DTYPES, Table, launch
from .step import TILE, stream_offsets

HALVINGS = tl.constexpr(TILE.value.bit_length() - 1)


@triton.jit
def halve(x):
    """The sum of TILE elements, as a block of one."""
    for k in tl.static_range(1, HALVINGS + 1):
        # tl.sum promises no order; of two elements there is only one sum.
        x = tl.sum(tl.reshape(x, [2, TILE >> k]), axis=0)
    return x


@triton.jit(do_not_specialize=["tensors", "tiles"])
def tile_sums_kernel(
    tile_tensor,  # int32 [tiles]
    shapes,  # int64 [3, tensors]
    addresses,  # int64 [streams, tensors]
    layouts,  # int64 [tensors, 1 + streams, DIMS] or None
    sums,  # float64 [2, tiles], written: the sums of x and of x * x
    tensors,
    tiles,
    DTYPE: tl.constexpr,
    STREAM: tl.constexpr,
    STREAMS: tl.constexpr,
    DIMS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    tensor = tl.load(tile_tensor + tile).to(tl.int64)
    numel = tl.load(shapes + tensor)
    index = (tile - tl.load(shapes + tensors + tensor)) * TILE + tl.arange(0, TILE)
    offsets = index
    if DIMS > 0:
        offsets = stream_offsets(layouts + tensor * (1 + STREAMS) * DIMS, STREAM, index, DIMS)
    base = tl.load(addresses + STREAM * tensors + tensor)
    pointer = base.to(tl.pointer_type(DTYPE)) + offsets
    x = tl.load(pointer, mask=(index < numel) & (base != 0), other=0.0).to(tl.float64)
    one = tl.arange(0, 1)
    tl.store(sums + tile + one, halve(x))
    tl.store(sums + tiles + tile + one, halve(x * x))


@triton.jit(do_not_specialize=["tensors", "tiles"])
def tensor_sums_kernel(
    shapes,  # int64 [3, tensors]
    tile_sums,  # float64 [2, tiles]
    sums,  # float64 [2, tensors], written
    tensors,
    tiles,
):
    tensor = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1).to(tl.int64)
    tile_sums += which * tiles + tl.load(shapes + tensors + tensor)
    count = (tl.load(shapes + tensor) + TILE - 1) // TILE
    index = tl.arange(0, TILE)
    lanes = tl.zeros([TILE], tl.float64)
    first = 0
    while first < count:
        lanes += tl.load(tile_sums + first + index, mask=first + index < count, other=0.0)
        first += TILE
    tl.store(sums + which * tensors + tensor + tl.arange(0, 1), halve(lanes))


def tensor_sums(dtypes: tuple[torch.dtype, ...], table: Table, stream: int = 1) -> torch.Tensor:
    """Return float64 [2, n] on the device: the sums of x and of x * x over each of n tensors.

    ``stream``: x is 0 the parameters, 1 the gradients as they lie in memory, 2 and on the states.
    """
    new = functools.partial(torch.empty, dtype=torch.float64, device=table.device)
    tile_sums, sums = new((2, table.tiles)), new((2, table.tensors))
    shapes, sizes = table.get("shapes"), (table.tensors, table.tiles)
    if table.tiles != 0:
        tables = map(table.get, ("tile_tensor", "shapes", "addresses", "layouts"))
        constants = (DTYPES[dtypes[stream]], stream, len(dtypes), table.dims)
        grid = (table.tiles, 1, 1)
        arguments = (*tables, tile_sums, *sizes)
        launch(tile_sums_kernel, grid, table.device, arguments, constants, constants)
    if table.tensors != 0:
        grid = (table.tensors, 2, 1)
        launch(tensor_sums_kernel, grid, table.device, (shapes, tile_sums, sums, *sizes), (), ())
    return sums

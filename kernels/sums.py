"""Sums over each tensor in float64, in an order that is part of the definition.

A tile of 1024 elements, zero padded, is summed by halving: x[i] += x[i + h], h = 512, 256, ... 1.
Lane j of 1024 then adds the sums of a tensor's tiles j, j + 1024, ... in that order to 0, and the
lanes are halved in the same way. Every back-end keeps to it: sums are the same bits on all.
"""

import triton
import triton.language as tl

# Elements per program, and per tile of a sum; the same in every back-end (csrc/launch.h).
TILE = tl.constexpr(1024)
HALVINGS = tl.constexpr(TILE.value.bit_length() - 1)


@triton.jit
def halve(x):
    """The sum of a tile."""
    # A split brings both elements to one thread: after it, warps exchange an eighth of the tile.
    for k in tl.static_range(1, 4):
        low, high = tl.split(tl.trans(tl.reshape(x, [2, TILE >> k])))
        x = low + high
    for k in tl.static_range(4, HALVINGS):
        # tl.sum promises no order; of two elements there is only one sum.
        x = tl.sum(tl.reshape(x, [2, TILE >> k]), axis=0)
    return tl.sum(x, axis=0)


@triton.jit
def sum_of_tiles(sums, count):
    """The sum of a tensor of ``count`` tiles, from their sums."""
    lane = tl.arange(0, TILE)
    lanes = tl.zeros([TILE], tl.float64)
    first = 0
    while first < count:
        lanes += tl.load(sums + first + lane, mask=first + lane < count, other=0.0)
        first += TILE
    return halve(lanes)

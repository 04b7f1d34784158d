"""Sums over tensors by the Triton kernels, interpreted: bit-equal to their definition in torch."""

import pytest
import torch
from interpreter import (
    F16,
    F32,
    F64,
    SIZES,
    dtypes_of,
    interpreted_fixture,  # noqa: F401
    items_of,
    randn,
    rows_of,
    table_of,
)

from fused_momentum.rules import RULES


def halve(x):
    while x.shape[-1] > 1:
        low, high = x.chunk(2, dim=-1)
        x = low + high
    return x[..., 0]


def tiles_of(x):
    return torch.nn.functional.pad(x, (0, -len(x) % 1024)).view(-1, 1024)


def sum_of_tiles(tiles):
    lanes = torch.zeros(1024, dtype=F64)
    for row in tiles_of(tiles):
        lanes = lanes + row
    return halve(lanes)


def ordered_sum(x):
    """The definition of a sum over a tensor, in torch."""
    return sum_of_tiles(halve(tiles_of(x.double())))


def check_sums(dtype):
    from fused_momentum.kernels import tensor_sums

    torch.manual_seed(5)
    rule, signature = RULES["sgd"], (dtype, F64 if dtype == F64 else F32)
    rows = rows_of(rule)
    items = items_of(rule, signature, rows, (*SIZES, (30, 50), 70 * 1024 + 3))
    items[7].streams[1] = randn((50, 30), dtype).t()
    table = table_of(items, rows, (1.0, -1.0, 0.5))
    sums = tensor_sums(dtypes_of(rule, signature), table)
    # In the order of the parameter's memory, which the gradient does not share.
    grads = [item.streams[1].flatten().double() for item in items]
    expected = [[ordered_sum(g) for g in grads], [ordered_sum(g * g) for g in grads]]
    assert torch.equal(sums, torch.tensor(expected, dtype=F64))
    assert torch.equal(tensor_sums(dtypes_of(rule, signature), table), sums)
    if dtype == F64:  # narrower values add up exactly, in any order
        other = [g.flip(0).cumsum(0)[-1] if len(g) else 0.0 for g in grads]
        assert not torch.equal(sums[0], torch.tensor(other, dtype=F64))


@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=["f32", "f64", "f16"])
def test_sums_keep_to_their_order(dtype, interpreted):
    """The sums of g and g * g have the bits of the definition; another order has others."""
    interpreted(check_sums, dtype)


def check_sum_of_many_tiles():
    from fused_momentum.kernels.launch import launch
    from fused_momentum.kernels.sums import tensor_sums_kernel

    torch.manual_seed(6)
    counts = (2500, 1, 1025)
    tile_sums = torch.randn(2, sum(counts), dtype=F64)
    firsts = [0, 2500, 2501]
    shapes = torch.tensor([[n * 1024 for n in counts], firsts, [0, 0, 0]])
    sums = torch.full((2, 3), torch.nan, dtype=F64)
    arguments = (shapes, tile_sums, sums, 3, sum(counts))
    launch(tensor_sums_kernel, (3, 2, 1), torch.device("cpu"), arguments, (), ())
    expected = [[sum_of_tiles(part) for part in row.split(counts)] for row in tile_sums]
    assert torch.equal(sums, torch.tensor(expected, dtype=F64))


def test_sum_of_more_tiles_than_lanes(interpreted):
    interpreted(check_sum_of_many_tiles)

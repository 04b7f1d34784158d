"""Sums over tensors by the CUDA kernels' source, run on the CPU (tests/shim)."""

import pytest
import shim
import torch
from cases import LAYOUTS, TILE, bits, values
from shim.steps import ALL_FORMS, NUMBERS, real

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason=f"no C++ compiler {shim.CXX[0]}")


@pytest.fixture(scope="session")
def kernels(request):
    return shim.Shim(request.config.cache.mkdir("shim"))


def halved(x):
    """The sum over the last dimension by halving: x[i] += x[i + h] for h = n / 2, ... 1."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def rows_of_tiles(x):
    """Padded with zeros to whole tiles, one per row."""
    return torch.nn.functional.pad(x, (0, -len(x) % TILE)).view(-1, TILE)


def defined_sum(terms):
    """The definition of a sum over a tensor (csrc/cuda/sums.cuh), by another way of writing it."""
    lanes = torch.zeros(TILE, dtype=torch.float64)
    for row in rows_of_tiles(halved(rows_of_tiles(terms))):
        lanes = lanes + row
    return halved(lanes)


def sums_of(kernels, grads, **options):
    """The sums of g and of g * g over each gradient: the rule `totals` of the shim keeps them."""
    tiles = sum(-(-g.numel() // TILE) for g in grads)
    scratch = {
        "tile_sums": torch.zeros(2 * max(tiles, 1), dtype=torch.float64),
        "tensor_scalars": torch.zeros(len(grads), dtype=torch.float64),
    }
    kept = [[torch.zeros((), dtype=torch.float64) for _ in range(2)] for _ in grads]
    result = kernels.run(
        NUMBERS["totals"],
        [[g, g, None] for g in grads],
        hyper=[[0.0]],
        kept=kept,
        measures=1,
        **scratch,
        **options,
    )
    assert (result.code, result.strays, result.misaligned) == (0, 0, 0)
    return torch.stack([torch.stack(numbers) for numbers in kept], 1), result


def in_memory_order(g):
    """The elements as the plan visits them: outermost the largest stride."""
    order = sorted(range(g.ndim), key=lambda d: -g.stride(d))
    return g.permute(order).flatten()


@pytest.mark.parametrize("dtype", shim.DTYPES, ids=str)
def test_sums_are_taken_in_the_defined_order(kernels, dtype):
    grads = [
        LAYOUTS[form.grad_layout](values(form.shape, dtype, i)) for i, form in enumerate(ALL_FORMS)
    ]
    grads = [real(g) for g in grads]
    grads.append(values((TILE * TILE + 5 * TILE + 3,), dtype, 99))  # more tiles than lanes
    sums, result = sums_of(kernels, grads)
    for i, g in enumerate(grads):
        x = in_memory_order(g).double()
        truth = torch.stack([defined_sum(x), defined_sum(x * x)])
        assert torch.equal(bits(sums[:, i]), bits(truth)), f"tensor {i} {list(g.shape)}"
        assert result.counts.are(g, reads=1, writes=0)


def test_sums_do_not_depend_on_the_order_of_blocks_or_on_other_tensors(kernels):
    grads = [values((n,), torch.float32, n) for n in (100_003, 0, 5, *range(1, 1200))]
    grads[0] = grads[0].double().exp()
    runs = [sums_of(kernels, grads, seed=seed, capturing=seed == 2)[0] for seed in range(3)]
    alone = torch.cat([sums_of(kernels, [g])[0] for g in grads], 1)
    for run in runs:
        assert torch.equal(bits(run), bits(alone))
    assert alone[0, 0] != grads[0].cumsum(0)[-1], "the order of the additions shows in the bits"

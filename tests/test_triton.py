"""The Triton kernels in Triton's interpreter, on CPU tensors: bit-equal to the reference."""

import pytest
import torch
from interpreter import (
    F16,
    F32,
    F64,
    assert_equal,
    clone,
    dtypes_of,
    hyper_of,
    interpreted_fixture,  # noqa: F401
    items_of,
    randn,
    rows_of,
    table_of,
)

from fused_momentum import reference
from fused_momentum.rules import RULES

BF16 = pytest.param(
    (torch.bfloat16, F32),
    marks=pytest.mark.skip(
        reason="Triton's interpreter truncates float32 -> bfloat16, where a GPU rounds to nearest"
    ),
)
rules = pytest.mark.parametrize("name", RULES)
# Of the parameter and the gradient, and of the states.
signatures = pytest.mark.parametrize(
    "signature",
    [(F32, F32), (F64, F64), (F16, F32), BF16],
    ids=["f32", "f64", "f16-f32", "bf16-f32"],
)


def check_step(rule, signature, items, rows, multipliers=(1.0, -1.0, 0.5), found=None, scale=None):
    """One launch over the items equals the reference on each; returns what they were before."""
    from fused_momentum.kernels import run

    before, expected = clone(items), clone(items)
    device_scale = None if scale is None else torch.tensor([scale])
    found_inf = None if found is None else torch.tensor([float(found)])
    unscale = 1.0 if scale is None else torch.tensor(1.0 / scale).item()  # rounded to float32
    table = table_of(items, rows, multipliers)
    run(rule, dtypes_of(rule, signature), table, grad_scale=device_scale, found_inf=found_inf)
    for item in expected if not found else ():
        p, g, *states = item.streams
        multiplier = multipliers[item.row] * unscale
        hyper = rows[item.row]
        reference.update(rule, p, g, states, hyper, grad_multiplier=multiplier, first=item.first)
    assert_equal(items, expected)
    return before


def check_sizes(name, signature):
    torch.manual_seed(0)
    rule = RULES[name]
    rows = rows_of(rule)
    items = items_of(rule, signature, rows)
    before = check_step(rule, signature, items, rows)
    for item, old in zip(items, before, strict=True):
        assert torch.equal(item.streams[1], old.streams[1]), "a gradient was modified"
        # The numbers matter: without an update nothing here would be equal.
        assert item.streams[0].numel() == 0 or not torch.equal(item.streams[0], old.streams[0])


@rules
@signatures
def test_every_size_and_group(name, signature, interpreted):
    """Sizes around a tile, three groups, absent states and first steps in one launch."""
    interpreted(check_sizes, name, signature)


def check_layouts(name, signature):
    torch.manual_seed(1)
    rule = RULES[name]
    rows = rows_of(rule)
    shapes = (5, 2000, (2, 3, 5, 7), (40, 60), (6, 4), (1, 9), (3, 0, 2))
    items = items_of(rule, signature, rows, shapes)

    def put(item, stream, change):
        if items[item].streams[stream] is not None:
            items[item].streams[stream] = change(items[item].streams[stream])

    param = signature[0]
    put(1, 0, lambda t: randn((t.numel() + 1,), param)[1:])  # an address off by one element
    put(2, 1, lambda t: t.to(memory_format=torch.channels_last))
    put(3, 0, lambda t: randn((60, 40), param).t())
    put(3, 2, lambda t: randn((80, 120), t.dtype)[::2, ::2])
    put(4, 1, lambda t: randn((1, 1), param).expand(6, 4))
    put(5, 1, lambda t: randn((9, 4), param)[:, 1][None])
    check_step(rule, signature, items, rows)


@rules
@signatures
def test_every_layout(name, signature, interpreted):
    """Misaligned, transposed, sliced, expanded and channels-last streams beside contiguous ones."""
    interpreted(check_layouts, name, signature)


def check_scaling(name, signature):
    torch.manual_seed(2)
    rule = RULES[name]
    rows = rows_of(rule)
    sizes = (3, 1030)
    check_step(rule, signature, items_of(rule, signature, rows, sizes), rows, scale=3.0)
    check_step(rule, signature, items_of(rule, signature, rows, sizes), rows, scale=3.0, found=0)
    items = items_of(rule, signature, rows, sizes)
    before = check_step(rule, signature, items, rows, found=2)
    assert_equal(items, before)


@rules
@signatures
def test_grad_scale_and_found_inf(name, signature, interpreted):
    """Gradients are divided by the scale as GradScaler does; found_inf leaves everything alone."""
    interpreted(check_scaling, name, signature)


def check_signatures(name):
    from fused_momentum import kernels

    torch.manual_seed(7)
    rule = RULES[name]
    rows = rows_of(rule)
    pairs = [(F32, F32), (F16, F32), (F64, F64), (F16, F16), (torch.complex64, torch.complex64)]
    items = [item for pair in pairs for item in items_of(rule, pair, rows[:2], (7, 1500))]
    expected = clone(items)
    batches = kernels.batches([kernels.Item(i.streams, i.row, [i.first]) for i in items])
    assert len(batches) == 4  # complex64 is float32, twice as many
    kernels.Launcher(rule).run(batches, hyper_of(rows[:2], (1.0, -1.0)))
    for item in expected:
        p, g, *states = item.streams
        scale = (1.0, -1.0)[item.row]
        reference.update(
            rule, p, g, states, rows[item.row], grad_multiplier=scale, first=item.first
        )
    assert_equal(items, expected)


@rules
def test_one_launch_per_signature(name, interpreted):
    """Tensors are sorted by their dtypes; complex ones are pairs of real ones."""
    interpreted(check_signatures, name)


def check_one_ulp(name):
    from fused_momentum.kernels import run

    torch.manual_seed(3)
    rule, signature, multipliers = RULES[name], (F32, F32), (1.0, -1.0, 0.5)
    rows = rows_of(rule)
    items = items_of(rule, signature, rows, (1030, 1030, 1030))
    nudged = clone(items)
    check_step(rule, signature, items, rows, multipliers)
    up = torch.tensor(1.0)
    rows = [[torch.nextafter(torch.tensor(lr), up).item(), *others] for lr, *others in rows]
    run(rule, dtypes_of(rule, signature), table_of(nudged, rows, multipliers))
    for item, other in zip(items, nudged, strict=True):
        assert not torch.equal(item.streams[0], other.streams[0])


@rules
def test_one_ulp_of_lr_is_seen(name, interpreted):
    """Negative control: bit-equality is strict enough to tell the nearest two learning rates."""
    interpreted(check_one_ulp, name)


def check_large_offsets(name):
    """The last tile of a tensor of 2^33 + 5 elements, of which only that tile has memory."""
    from fused_momentum.kernels import run

    torch.manual_seed(4)
    rule, signature = RULES[name], (F16, F16)
    rows = rows_of(rule)[:1]
    items = items_of(rule, signature, rows, (5,))
    expected = clone(items)
    p, g, *states = expected[0].streams
    reference.update(rule, p, g, states, rows[0], first=True)
    table = table_of(items, rows, (1.0,))
    tiles = 2**33 // 1024
    table.get("addresses").sub_(2**33 * F16.itemsize)
    table.get("shapes").copy_(torch.tensor([[2**33 + 5], [-tiles], [0]]))
    run(rule, dtypes_of(rule, signature), table)
    assert_equal(items, expected)


@rules
def test_offsets_beyond_32_bits(name, interpreted):
    """Elements beyond 2^31 are found."""
    interpreted(check_large_offsets, name)

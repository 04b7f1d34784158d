"""The Triton kernels in Triton's interpreter, on CPU tensors: bit-equal to the reference."""

import pytest
import torch
from interpreter import (
    F16,
    F32,
    F64,
    assert_equal,
    batches_of,
    clone,
    interpreted_fixture,  # noqa: F401
    items_of,
    randn,
    reference_step,
    rows_of,
    step,
    table_of,
)
from toy_rule import TOY

from fused_momentum.rules import RULES

RULES = {**RULES, TOY.name: TOY}
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


def check_step(rule, items, rows, found=None, scale=None):
    """One step of the items equals the reference on each; returns what they were before."""
    from fused_momentum.kernels import Launcher

    before, expected = clone(items), clone(items)
    amp = {
        "grad_scale": None if scale is None else torch.tensor([scale]),
        "found_inf": None if found is None else torch.tensor([float(found)]),
    }
    step(Launcher(rule), rule, items, rows, **amp)
    if not found:
        reference_step(rule, expected, rows, scale=scale or 1.0)
    assert_equal(items, expected)
    return before


def check_sizes(name, signature):
    torch.manual_seed(0)
    rule = RULES[name]
    rows = rows_of(rule)
    items = items_of(rule, signature, rows)
    before = check_step(rule, items, rows)
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
    check_step(rule, items, rows)


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
    check_step(rule, items_of(rule, signature, rows, sizes), rows, scale=3.0)
    check_step(rule, items_of(rule, signature, rows, sizes), rows, scale=3.0, found=0)
    items = items_of(rule, signature, rows, sizes)
    before = check_step(rule, items, rows, found=2)
    assert_equal(items, before)


@rules
@signatures
def test_grad_scale_and_found_inf(name, signature, interpreted):
    """Gradients are divided by the scale as GradScaler does; found_inf leaves everything alone."""
    interpreted(check_scaling, name, signature)


def check_signatures(name):
    torch.manual_seed(7)
    rule = RULES[name]
    rows = [rows_of(rule)[0]] * 2
    pairs = [(F32, F32), (F16, F32), (F64, F64), (F16, F16), (torch.complex64, torch.complex64)]
    items = [item for pair in pairs for item in items_of(rule, pair, rows, (7, 1500))]
    # complex64 is float32, twice as many
    assert len(batches_of(rule, items)) == 4
    check_step(rule, items, rows)


@rules
def test_one_launch_per_signature(name, interpreted):
    """Tensors are sorted by their dtypes; complex ones are pairs of real ones."""
    interpreted(check_signatures, name)


def check_one_ulp(name):
    from fused_momentum.kernels import Launcher

    torch.manual_seed(3)
    rule = RULES[name]
    rows = rows_of(rule)
    items = items_of(rule, (F32, F32), rows, [1030] * len(rows))
    nudged = clone(items)
    check_step(rule, items, rows)
    lr = rule.hyper.index("lr" if "lr" in rule.hyper else "rate")
    for row in rows:
        row[lr] = torch.nextafter(torch.tensor(row[lr]), torch.tensor(1.0)).item()
    step(Launcher(rule), rule, nudged, rows)
    for item, other in zip(items, nudged, strict=True):
        assert not torch.equal(item.streams[0], other.streams[0])


@rules
def test_one_ulp_of_lr_is_seen(name, interpreted):
    """Negative control: bit-equality is strict enough to tell the nearest two learning rates."""
    interpreted(check_one_ulp, name)


def check_large_offsets(name):
    """The last tile of a tensor of 2^33 + 5 elements, of which only that tile has memory."""
    from fused_momentum.kernels import Launcher

    torch.manual_seed(4)
    rule = RULES[name]
    rows = rows_of(rule)[:1]
    items = items_of(rule, (F16, F16), rows, (5,))
    expected = clone(items)
    reference_step(rule, expected, rows, measures=False)
    table = table_of(rule, items, rows)
    tiles = 2**33 // 1024
    addresses, shapes = table.get("addresses", "shapes")
    addresses.sub_(2**33 * F16.itemsize)
    shapes.copy_(torch.tensor([[2**33 + 5], [-tiles], [0]]))
    Launcher(rule).update_table(table)
    assert_equal(items, expected)


@rules
def test_offsets_beyond_32_bits(name, interpreted):
    """Elements beyond 2^31 are found."""
    interpreted(check_large_offsets, name)

"""The measuring pass of the Triton kernels, interpreted: sums, steps, what is read and written."""

import itertools

import pytest
import torch
from interpreter import (
    F16,
    F32,
    F64,
    SIZES,
    Item,
    assert_equal,
    batches_of,
    clone,
    hyper_of,
    interpreted_fixture,  # noqa: F401
    items_of,
    randn,
    reference_step,
    rows_of,
    step,
)
from toy_rule import SPY, TOY

from fused_momentum.rules import RULES, Kept, Measure, Rule
from fused_momentum.rules.functions import widen

MEASURING = {rule.name: rule for rule in (*RULES.values(), TOY) if rule.measure}
rules = pytest.mark.parametrize("name", MEASURING)
signatures = pytest.mark.parametrize(
    "signature", [(F32, F32), (F64, F64), (F16, F32)], ids=["f32", "f64", "f16-f32"]
)

# --- sums ------------------------------------------------------------------------------------


def derive_nothing(lr, first, total, squares):
    return (lr,)


def keep_param(p, g, lr):
    return (p,)


def sum_terms(p, g, lr):
    return g, widen(g) * widen(g)


def keep_sums(lr, numel, updates, total, squares, new_total, new_squares):
    return lr, new_total, new_squares


def never_settled(lr, total, squares):
    return 0.0


SUMS = Rule(
    name="sums",
    hyper=("lr",),
    scalars=("lr",),
    derive=derive_nothing,
    states=(),
    update=keep_param,
    kept=(Kept("total", dtype="float64"), Kept("squares", dtype="float64")),
    measure=Measure(sum_terms, sums=2, settle=keep_sums, settled=never_settled),
    formula="keeps the sums of g and g * g",
    source="none",
)


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
    from fused_momentum.kernels import Launcher

    torch.manual_seed(5)
    items = items_of(SUMS, (dtype, dtype), [[1.0]], (*SIZES, (30, 50), 70 * 1024 + 3, 2049))
    items[7].streams[1] = randn((50, 30), dtype).t()
    items[9].streams[1] = randn((2050,), dtype)[1:]
    step(Launcher(SUMS), SUMS, items, [[1.0]])
    for item in items:
        # In the order of the parameter's memory, which the gradient does not share.
        g = item.streams[1].flatten().double()
        assert item.kept == [ordered_sum(g), ordered_sum(g * g)]
    if dtype == F64:  # narrower values add up exactly, in any order
        grads = [item.streams[1].flatten() for item in items[1:]]
        assert [item.kept[0] for item in items[1:]] != [g.flip(0).cumsum(0)[-1] for g in grads]


@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=["f32", "f64", "f16"])
def test_sums_keep_to_their_order(dtype, interpreted):
    """The sums of g and g * g have the bits of the definition; another order has others."""
    interpreted(check_sums, dtype)


def check_sum_of_many_tiles():
    from fused_momentum.kernels.launch import launch
    from fused_momentum.kernels.passes import settle_constants
    from fused_momentum.kernels.step import settle_kernel

    torch.manual_seed(6)
    counts = (2500, 1, 1025)
    tile_sums = torch.randn(2, sum(counts), dtype=F64)
    shapes = torch.tensor([[n * 1024 for n in counts], [0, 2500, 2501], [0, 0, 0]])
    sums = torch.full((2, 3), torch.nan, dtype=F64)
    kept = torch.tensor([[t.data_ptr() for t in row] for row in sums])
    hyper, first, found = torch.ones(1, 2, dtype=F64), *torch.zeros(2, 1, 3, dtype=F64)
    arguments = (shapes, first, kept, hyper, None, None, tile_sums, found, 3, sum(counts), 1)
    launch(settle_kernel, 3, torch.device("cpu"), arguments, settle_constants(SUMS), ())
    expected = [[sum_of_tiles(part) for part in row.split(counts)] for row in tile_sums]
    assert torch.equal(sums, torch.tensor(expected, dtype=F64))


def test_sum_of_more_tiles_than_lanes(interpreted):
    interpreted(check_sum_of_many_tiles)


# --- steps -----------------------------------------------------------------------------------

# Gradients of which the statistics are not what they are of others.
DEGENERATE = [
    torch.zeros_like,
    lambda g: -torch.zeros_like(g),
    lambda g: torch.full_like(g, 0.3),
    lambda g: 1.0 + 1e-7 * g,
    lambda g: g * torch.finfo(g.dtype).smallest_normal,
    lambda g: torch.where(torch.arange(g.numel()).view(g.shape) == 0, 1.0, 0.0).to(g.dtype),
    lambda g: torch.full_like(g, torch.inf),
    lambda g: torch.full_like(g, torch.nan),
]
# Whether the measuring pass is run, and the update; what the GradScaler has found.
STEPS = [
    {"found_inf": 1.0},
    {"updates": False},
    {"updates": False, "found_inf": 1.0},
    {},
    {"measures": False},
    {"found_inf": 1.0, "grad_scale": 3.0},
    {"updates": False, "grad_scale": 3.0},
    {"measures": False},
    {"found_inf": 0.0},
    {},
]


def all_rows(rule):
    """Hyper-parameters of groups, with all combinations of words."""
    rows = rows_of(rule)
    words = list(itertools.product(*(range(len(words)) for words in rule.choices.values())))
    made = [list(rows[i % len(rows)]) for i in range(max(len(rows), len(words)))]
    for row, numbers in zip(made, words, strict=False):
        for key, number in zip(rule.choices, numbers, strict=True):
            row[rule.hyper.index(key)] = float(number)
    return made


def check_steps(name, signature):
    from fused_momentum.kernels import Launcher

    torch.manual_seed(8)
    rule = MEASURING[name]
    rows = all_rows(rule)
    sizes = itertools.cycle([1, 33, 2, (3, 350), 0])
    items = items_of(rule, signature, rows, list(itertools.islice(sizes, 6 + len(rows))))
    expected = clone(items)
    launcher = Launcher(rule)
    for number, given in enumerate(STEPS):
        how = {k: v for k, v in given.items() if k in ("measures", "updates")}
        amp = {k: torch.tensor([v]) for k, v in given.items() if k not in how}
        for i, (item, other) in enumerate(zip(items, expected, strict=True)):
            grad = randn(item.streams[0].shape, signature[0])
            # Every other tensor stays finite.
            changes = dict(enumerate(DEGENERATE if i % 2 else DEGENERATE[:-2]))
            grad = changes.get((i + 3 * number) % 11, torch.clone)(grad)
            item.streams[1] = other.streams[1] = grad
        step(launcher, rule, items, rows, **how, **amp)
        if not given.get("found_inf"):
            reference_step(rule, expected, rows, scale=given.get("grad_scale", 1.0), **how)
        assert_equal(items, expected)
        items, expected = ([i._replace(first=False) for i in t] for t in (clone(items), expected))
    kept = [str(item.kept) for item in items]
    assert len(set(kept)) > len(kept) // 3, "nothing was measured"


@rules
@signatures
def test_steps_of_every_kind(name, signature, interpreted):
    """Degenerate gradients, skipped steps, steps that only measure, steps that do not measure."""
    interpreted(check_steps, name, signature)


def check_abandoned_step():
    from fused_momentum.kernels import Launcher

    torch.manual_seed(9)
    rows = rows_of(TOY)
    items = items_of(TOY, (F32, F32), rows, (7, 7, 7))
    expected, other, launcher = clone(items), clone(items), Launcher(TOY)
    launcher.measure(batches_of(TOY, other), hyper_of(rows), True)
    launcher.measure(batches_of(TOY, other), hyper_of(rows), False)
    step(launcher, TOY, items, rows, measures=False)
    reference_step(TOY, expected, rows, measures=False)
    assert_equal(items, expected)


def test_what_an_abandoned_step_has_measured_is_forgotten(interpreted):
    interpreted(check_abandoned_step)


# --- what is read ----------------------------------------------------------------------------


def check_reads(layout):
    from fused_momentum.kernels import Launcher

    for on in (0.0, 1.0):
        streams = [layout(randn((40, 60), F32)) for _ in range(4)]
        p, g, a, _ = (t.clone() for t in streams)
        step(Launcher(SPY), SPY, [Item(streams, 0, False, [])], [[on]])
        zero = torch.zeros_like(p)
        expected = (p + a, g, a, zero) if on else (p + g, g, zero, zero)
        for tensor, wanted in zip(streams, expected, strict=True):
            assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("layout", [torch.clone, torch.t], ids=["contiguous", "strided"])
def test_a_stream_that_is_not_read_is_zero(layout, interpreted):
    interpreted(check_reads, layout)

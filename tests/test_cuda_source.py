"""The CUDA kernels' source, run on the CPU: every block and thread, every access counted.

No GPU takes part. What differs there is replaced by tests/shim: csrc/cuda/machine.cuh (loads,
stores and conversions of one instruction each) and csrc/cuda/launch.cu (calls of the CUDA runtime).
"""

import pytest
import shim
import torch
from cases import (
    FORMS,
    LAYOUTS,
    RULES,
    TILE,
    TYPES,
    VARIANTS,
    Form,
    bits,
    rules,
    types,
    values,
    variants,
)

from fused_momentum import reference

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason=f"no C++ compiler {shim.CXX[0]}")

ALL_FORMS = tuple(FORMS.values())
NUMBERS = {name: i for i, name in enumerate(RULES)}
F32 = TYPES["f32"]
FOUR = ("f32", "f64", "bf16", "f16")
four_types = pytest.mark.parametrize("types", [TYPES[key] for key in FOUR], ids=FOUR)


@pytest.fixture(scope="session")
def kernels(request):
    return shim.Shim(request.config.cache.mkdir("shim"))


# --- updates ---------------------------------------------------------------------------------


def defaults(rule):
    """Hyper-parameters of the first variant of a rule."""
    return next(v.hyper for v in VARIANTS.values() if v.name == rule.name)


def make(rule, types, forms):
    """Streams p, g, *states for each form, with random values."""
    grad_type = types.grad or types.param
    made = []
    for i, form in enumerate(forms):
        p = LAYOUTS[form.layout](values(form.shape, types.param, 3 * i))
        g = LAYOUTS[form.grad_layout](values(form.shape, grad_type, 3 * i + 1))
        state_type = types.state or reference.compute_dtype(p)
        if p.is_complex():
            state_type = types.param
        states = [torch.empty_like(p, dtype=state_type) for _ in rule.states]
        for k, state in enumerate(states):
            state.copy_(values(form.shape, state_type, 3 * i + 2 + 1000 * k))
        made.append([shim.real(t) for t in (p, g, *states)])
    return made


def vectors(rule, sizes, types=F32):
    return make(rule, types, [form_of(n) for n in sizes])


def form_of(n, layout="contiguous"):
    return Form((n,), layout, layout)


def copies(tensors):
    """The same values at the same places in new memory."""
    made = []
    for streams in tensors:
        made.append([])
        for t in streams:
            if t is not None:
                whole = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
                t = whole.clone().as_strided(t.shape, t.stride(), t.storage_offset())
            made[-1].append(t)
    return made


def check(kernels, rule, tensors, hyper, *, launches=1, rows=None, first=None, **options):
    """One step by the kernels: bits of the reference, every element read and written once."""
    ours, truth = copies(tensors), copies(tensors)
    by_row = hyper if rows else [hyper]
    result = kernels.run(
        NUMBERS[rule.name],
        ours,
        hyper=[list(map(float, row.values())) for row in by_row],
        rows=rows,
        first=first,
        **options,
    )
    multipliers = options.get("multipliers") or [1.0] * len(by_row)
    for i, streams in enumerate(truth):
        row = rows[i] if rows else 0
        reference.update(
            rule,
            *streams[:2],
            streams[2:],
            by_row[row].values(),
            grad_multiplier=multipliers[row],
            first=bool(first and first[i]),
        )
    assert result.code == 0
    assert_same(ours, truth)
    assert_touched_once(result, ours)
    assert result.launches == launches
    return result


def assert_same(ours, truth):
    for i, (mine, true) in enumerate(zip(ours, truth, strict=True)):
        for k, (x, y) in enumerate(zip(mine, true, strict=True)):
            if x is not None:
                assert torch.equal(bits(x), bits(y)), f"stream {k} of tensor {i} {list(x.shape)}"


def touched_once(result, tensors):
    return all(
        result.counts.are(t, reads=1, writes=int(k != 1))
        for streams in tensors
        for k, t in enumerate(streams)
        if t is not None
    )


def assert_touched_once(result, tensors):
    assert result.strays == 0, "memory of no tensor was touched"
    assert result.misaligned == 0
    assert touched_once(result, tensors)


def assert_untouched(result, tensors):
    assert result.strays == 0
    assert all(result.counts.are(t, 0, 0) for streams in tensors for t in streams)


@types
@variants
def test_every_case_of_the_table_in_one_launch(kernels, variant, types):
    tensors = make(variant.rule, types, ALL_FORMS)
    first = [float(i % 2) for i in range(len(tensors))]
    check(kernels, variant.rule, tensors, variant.hyper, first=first)


@rules
@four_types
@pytest.mark.parametrize("layout", ["contiguous", "offset", "gaps"])
def test_tails_of_every_length(kernels, rule, types, layout):
    sizes = [*range(34), *(TILE + n for n in range(34)), *(3 * TILE - n for n in range(34))]
    tensors = make(rule, types, [form_of(n, layout) for n in sizes])
    check(kernels, rule, tensors, defaults(rule))


@rules
@four_types
@pytest.mark.parametrize("shifted", range(3), ids=["p", "g", "state"])
@pytest.mark.parametrize("by", [1, 2, 3])
def test_views_that_are_not_aligned(kernels, rule, types, shifted, by):
    (streams,) = make(rule, types, [form_of(5 * TILE + 5)])
    n = 4 * TILE + 5
    views = [t[by : by + n] if k == shifted else t[:n] for k, t in enumerate(streams)]
    check(kernels, rule, [views], defaults(rule))


@pytest.mark.parametrize("key", ["f32", "f64", "bf16", "f16", "bf16_state_bf16", "f32_grad_bf16"])
def test_whole_tiles_are_moved_in_accesses_of_16_bytes(kernels, key):
    rule = RULES["sgd"]
    tensors = vectors(rule, [TILE, 5 * TILE], TYPES[key])
    result = check(kernels, rule, tensors, defaults(rule))
    sizes = [[t.numel() * t.element_size() for t in streams] for streams in tensors]
    assert result.scalars == 0
    assert result.vectors == sum(2 * p + g + 2 * m for p, g, m in sizes) // 16
    assert result.own_kernels == 1, "common types have a kernel of their own"


@rules
def test_absent_states_read_as_zero_and_share_the_launch(kernels, rule):
    tensors = vectors(rule, [5, TILE, 2 * TILE + 3], TYPES["bf16_state_bf16"])
    for streams in tensors[:2]:
        streams[2:] = [None] * len(rule.states)
    check(kernels, rule, tensors, defaults(rule))
    check(kernels, rule, tensors[:2], defaults(rule))


@variants
@pytest.mark.parametrize("per_block", range(1, 6))
def test_any_number_of_tiles_per_block(kernels, variant, per_block):
    tensors = vectors(variant.rule, [3 * TILE, 1, 0, 7 * TILE + 1, 9, 0])
    result = check(
        kernels, variant.rule, tensors, variant.hyper, tiles_per_block=per_block, seed=per_block
    )
    assert result.blocks == -(-13 // per_block)


@rules
@pytest.mark.parametrize("before", [2**31, 2**32 + 5 * TILE, 2**40])
@pytest.mark.parametrize("layout", ["contiguous", "offset", "gaps"])
def test_elements_beyond_32_bits(kernels, rule, before, layout):
    """The last blocks of a huge tensor, of which no more than their elements is there."""
    tensors = make(rule, TYPES["f64"], [form_of(3 * TILE + 5, layout)])
    check(kernels, rule, tensors, defaults(rule), before=before)


def test_a_launch_over_nothing_is_none(kernels):
    rule = RULES["sgd"]
    check(kernels, rule, vectors(rule, [0, 0]), defaults(rule), launches=0)


# --- many tensors, rows and types ------------------------------------------------------------


def capacity(kernels, rule, large):
    """Tensors that fit into kernel arguments beside one row of hyper-parameters."""
    words = kernels.words(large) - (len(rule.hyper) + 2)
    return words // (1 + 2 + len(rule.states))


@rules
def test_as_many_tensors_as_arguments_hold_and_one_more(kernels, rule):
    small, large = (capacity(kernels, rule, size) for size in (0, 1))
    assert small >= 160 and large >= 1000  # ResNet-50 has 161 tensors; bench/cases.py has 1000
    tensors = vectors(rule, [TILE + 1, *(i % 5 for i in range(1, large)), 3])
    for count, is_large, uploads in ((small, 0, 0), (large, 1, 0), (large + 1, 0, 1)):
        result = check(kernels, rule, tensors[:count], defaults(rule))
        assert (result.large, result.uploads) == (is_large, uploads)


@rules
def test_a_captured_step_takes_no_table(kernels, rule):
    """A graph outlives tables: every kernel carries what it needs."""
    count = 2 * capacity(kernels, rule, 1) + 1
    tensors = vectors(rule, [1 + i % 5 for i in range(count)])
    result = check(kernels, rule, tensors, defaults(rule), capturing=1, launches=3)
    assert result.uploads == 0


def rows_of(rule, count):
    """Different hyper-parameters for each row, some of them zero."""
    return [
        {key: 0.0 if (i + k) % 5 == 0 else value / (1 + i + k) for k, (key, value) in pairs}
        for i in range(count)
        for pairs in [list(enumerate(defaults(rule).items()))]
    ]


@rules
@pytest.mark.parametrize("count", [2, 60, 300, 1500], ids="{}_rows".format)
@pytest.mark.parametrize("capturing", [0, 1])
def test_rows_share_the_launch(kernels, rule, count, capturing):
    n = max(count, 40)
    rows = [(i * 7) % count if count < 100 else i for i in range(n)]
    tensors = vectors(rule, [1 + i % 3 for i in range(n - 1)] + [2 * TILE + 1])
    multipliers = [(-1.0) ** i * (1 + i) for i in range(count)]
    words = count * (len(rule.hyper) + 2) + n * (3 + len(rule.states))
    options = {"rows": rows, "multipliers": multipliers, "capturing": capturing}
    ours = -(-words // kernels.words(1)) if capturing else 1
    result = check(kernels, rule, tensors, rows_of(rule, count), launches=ours, **options)
    assert result.uploads == (not capturing and words > kernels.words(1))


def test_each_combination_of_types_is_a_launch(kernels):
    rule = RULES["sgd"]
    kinds = [TYPES[key] for key in ("f32", "bf16", "f64", "f32_grad_bf16", "f32_state_f64")]
    tensors = [vectors(rule, [n], t)[0] for n in (1, TILE + 1, 0, 5000) for t in kinds]
    result = check(kernels, rule, tensors, defaults(rule), launches=len(kinds))
    assert result.own_kernels == len(kinds) - 1  # float64 states over float32 have none


# --- what is read on the device --------------------------------------------------------------


@rules
def test_learning_rates_on_the_device(kernels, rule):
    rows = [defaults(rule) | {"lr": lr} for lr in (0.1, 0.2, 0.3)]
    lrs = [torch.tensor(0.7), None, torch.tensor(0.9, dtype=torch.float64)]
    tensors = vectors(rule, [TILE + 5, 7, 2 * TILE, 30])
    ours, truth = copies(tensors), copies(tensors)
    hyper = [list(map(float, row.values())) for row in rows]
    result = kernels.run(NUMBERS[rule.name], ours, hyper=hyper, rows=[0, 1, 2, 0], lr=lrs)
    assert_touched_once(result, ours)
    for lr, row in zip(lrs, rows, strict=True):
        if lr is not None:
            row["lr"] = lr.item()
    for streams, row in zip(truth, [0, 1, 2, 0], strict=True):
        reference.update(rule, *streams[:2], streams[2:], rows[row].values())
    assert_same(ours, truth)


def test_the_learning_rate_is_the_first_hyper_parameter():
    assert {rule.hyper[0] for rule in RULES.values()} == {"lr"}  # as csrc/cuda/pass.cuh has it


@rules
@four_types
def test_loss_scale_on_the_device(kernels, rule, types):
    scale = torch.tensor(3.0)  # its reciprocal is not exact
    tensors = make(rule, types, [form_of(TILE + 5)])
    ours, truth = copies(tensors), copies(tensors)
    hyper = [list(map(float, defaults(rule).values()))]
    kernels.run(NUMBERS[rule.name], ours, hyper=hyper, multipliers=[-1.0], grad_scale=scale)
    unscale = -scale.double().reciprocal().float().item()
    for streams in truth:
        values = defaults(rule).values()
        reference.update(rule, *streams[:2], streams[2:], values, grad_multiplier=unscale)
    assert_same(ours, truth)


@rules
@pytest.mark.parametrize("n", [7, TILE, 3 * TILE + 1])
def test_a_step_that_found_infinities_touches_nothing(kernels, rule, n):
    tensors = vectors(rule, [n, 5])
    hyper = [list(map(float, defaults(rule).values()))]
    result = kernels.run(NUMBERS[rule.name], tensors, hyper=hyper, found_inf=torch.tensor(1.0))
    assert result.launches == 1
    assert_untouched(result, tensors)
    check(kernels, rule, tensors, defaults(rule), found_inf=torch.tensor(0.0))


@variants
@pytest.mark.parametrize("count", [3, 1200], ids="{}_tensors".format)
def test_a_skipped_first_step_stays_the_first(kernels, variant, count):
    """Flags on the device: read by all blocks, cleared by the last unless it was skipped."""
    rule, number = variant.rule, NUMBERS[variant.name]
    tensors = vectors(rule, [3 * TILE + 7, 9, 0, *(1 + i % 5 for i in range(count - 3))])
    ours, truth = copies(tensors), copies(tensors)
    hyper = [list(map(float, variant.hyper.values()))]
    flags, ticket = torch.ones(count, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    flags[1] = 0
    for step, (found_inf, expected) in enumerate([(1.0, [1, 0]), (0.0, [0, 0]), (0.0, [0, 0])]):
        first = flags.tolist()
        result = kernels.run(
            number,
            ours,
            hyper=hyper,
            first=None,
            seed=step,
            tiles_per_block=1,
            found_inf=torch.tensor(found_inf),
            flags=flags,
            ticket=ticket,
        )
        assert result.launches == 1
        assert flags[:2].tolist() == expected and flags[2] == 1  # an empty tensor takes no step
        assert ticket.item() == 0, "a graph that is replayed starts as the first launch did"
        if found_inf:
            assert_untouched(result, ours)
            continue
        for streams, is_first in zip(truth, first, strict=True):
            values = variant.hyper.values()
            reference.update(rule, *streams[:2], streams[2:], values, first=bool(is_first))
        assert_same(ours, truth)


# --- the checks themselves -------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["skip_block", "repeat_block"])
def test_the_counts_see_a_block_too_few_or_too_many(kernels, fault):
    rule = RULES["sgd"]
    tensors = vectors(rule, [3 * TILE + 1, 5])
    hyper = [list(map(float, defaults(rule).values()))]
    sound, faulty = (
        kernels.run(0, tensors, hyper=hyper, tiles_per_block=1, **more) for more in ({}, {fault: 2})
    )
    assert touched_once(sound, tensors)
    assert not touched_once(faulty, tensors)


@pytest.mark.parametrize("unknown", range(3), ids=["p", "g", "state"])
def test_the_counts_see_an_access_outside(kernels, unknown):
    (streams,) = vectors(RULES["sgd"], [50])
    hyper = [list(map(float, defaults(RULES["sgd"]).values()))]
    before = streams[unknown].clone()
    result = kernels.run(0, [streams], hyper=hyper, unknown=streams[unknown])
    assert result.strays == (50 if unknown == 1 else 100)
    assert torch.equal(streams[unknown], before)

"""The CUDA kernels' source, run on the CPU: every block and thread, every access counted.

No GPU takes part. What differs there is replaced by tests/shim: csrc/cuda/machine.cuh (loads,
stores and conversions of one instruction each) and csrc/cuda/launch.cu (calls of the CUDA runtime).
"""

import pytest
import shim
import torch
from cases import RULES, TILE, TYPES, types
from shim.steps import (
    ALL_FORMS,
    ALL_RULES,
    ALL_VARIANTS,
    Step,
    assert_untouched,
    capacity,
    check,
    copies,
    defaults,
    form_of,
    fresh_kept,
    make,
    vectors,
    words_of,
)

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason=f"no C++ compiler {shim.CXX[0]}")

FOUR = ("f32", "f64", "bf16", "f16")
four_types = pytest.mark.parametrize("types", [TYPES[key] for key in FOUR], ids=FOUR)
rules = pytest.mark.parametrize("rule", ALL_RULES.values(), ids=ALL_RULES)
variants = pytest.mark.parametrize("variant", ALL_VARIANTS.values(), ids=ALL_VARIANTS)


@pytest.fixture(scope="session")
def kernels(request):
    return shim.Shim(request.config.cache.mkdir("shim"))


def both(tensors):
    return copies(tensors), copies(tensors)


# --- steps -----------------------------------------------------------------------------------


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
    _, _, streams = tensors
    streams[2] = None
    result = check(kernels, rule, [streams], defaults(rule))
    assert result.own_kernels == 1, "an absent state has the type of the others"


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


@rules
def test_as_many_tensors_as_arguments_hold_and_one_more(kernels, rule):
    small, large = (capacity(kernels, rule, size) for size in (0, 1))
    assert large >= 300  # ResNet-50 has 161 tensors
    if not rule.kept:
        assert small >= 160 and large >= 1000  # bench/cases.py has 1000
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
        {
            key: rule.choices[key][i % len(rule.choices[key])]
            if key in rule.choices
            else 0.0
            if (i + k) % 5 == 0
            else value / (1 + i + k)
            for k, (key, value) in enumerate(defaults(rule).items())
        }
        for i in range(count)
    ]


@rules
@pytest.mark.parametrize("count", [2, 60, 300, 1500], ids="{}_rows".format)
@pytest.mark.parametrize("capturing", [0, 1])
def test_rows_share_the_launch(kernels, rule, count, capturing):
    n = max(count, 40)
    rows = [(i * 7) % count if count < 100 else i for i in range(n)]
    tensors = vectors(rule, [1 + i % 3 for i in range(n - 1)] + [2 * TILE + 1])
    multipliers = [(-1.0) ** i * (1 + i) for i in range(count)]
    of_tensor, of_row = words_of(rule)
    words = count * of_row + n * of_tensor
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
    if rule.read is not None:
        pytest.skip("its hyper-parameters are worked out on the host")
    rows = [defaults(rule) | {"lr": lr} for lr in (0.1, 0.2, 0.3)]
    lrs = [torch.tensor(0.7), None, torch.tensor(0.9, dtype=torch.float64)]
    true = [
        row if lr is None else row | {"lr": lr.item()} for lr, row in zip(lrs, rows, strict=True)
    ]
    tensors = vectors(rule, [TILE + 5, 7, 2 * TILE, 30])
    check(kernels, rule, tensors, rows, rows=[0, 1, 2, 0], lr=lrs, true_hyper=true)


def test_the_learning_rate_is_the_first_hyper_parameter():
    first = {rule.hyper[0] for rule in RULES.values() if rule.read is None}
    assert first == {"lr"}  # as csrc/cuda/numbers.cuh has it


@rules
@four_types
def test_loss_scale_on_the_device(kernels, rule, types):
    scale = torch.tensor(3.0)  # its reciprocal is not exact
    tensors = make(rule, types, [form_of(TILE + 5)])
    unscale = -scale.double().reciprocal().float().item()
    options = {"multipliers": [-1.0], "true_multipliers": [unscale]}
    check(kernels, rule, tensors, defaults(rule), grad_scale=scale, **options)


@rules
@pytest.mark.parametrize("n", [7, TILE, 3 * TILE + 1])
def test_a_step_that_found_infinities_touches_nothing(kernels, rule, n):
    tensors = vectors(rule, [n, 5])
    step = Step(kernels, rule, tensors, tensors, defaults(rule), found_inf=torch.tensor(1.0))
    if rule.measure is not None:
        result = step.start_measuring()
        assert result.launches == 2
        assert_untouched(result, tensors + step.kept)
        assert (step.tensor_scalars == 0).all(), "the update may read them"
    result = step.run()
    assert result.launches == 1
    assert_untouched(result, tensors)
    check(kernels, rule, tensors, defaults(rule), found_inf=torch.tensor(0.0))


@pytest.mark.parametrize(
    ("variant", "count"),
    [(v, 3) for v in ALL_VARIANTS.values()] + [(ALL_VARIANTS[name], 1200) for name in ALL_RULES],
    ids=[*ALL_VARIANTS, *map("{}-1200_tensors".format, ALL_RULES)],
)
def test_a_skipped_first_step_stays_the_first(kernels, variant, count):
    """Flags on the device: read by all blocks, cleared by the last unless it was skipped."""
    rule = variant.rule
    tensors = vectors(rule, [3 * TILE + 7, 9, 0, *(1 + i % 5 for i in range(count - 3))])
    ours, truth = copies(tensors), copies(tensors)
    kept = fresh_kept(rule, count), fresh_kept(rule, count)
    flags, ticket = torch.ones(count, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    flags[1] = 0
    for seed, (found_inf, expected) in enumerate([(1.0, [1, 0]), (0.0, [0, 0]), (0.0, [0, 0])]):
        options = {"flags": flags, "ticket": ticket, "found_inf": torch.tensor(found_inf)}
        options |= {"true_first": flags.tolist(), "kept": kept, "seed": seed, "tiles_per_block": 1}
        step = Step(kernels, rule, ours, truth, variant.hyper, **options)
        if rule.measure is not None:
            step.start_measuring() if found_inf else step.measure()
        result = step.run() if found_inf else step.update()
        assert result.launches == 1
        assert flags[:2].tolist() == expected and flags[2] == 1  # an empty tensor takes no step
        assert ticket.item() == 0, "a graph that is replayed starts as the first launch did"
        if found_inf:
            assert_untouched(result, step.streams)


# --- the checks themselves -------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["skip_block", "repeat_block"])
@pytest.mark.parametrize("name", ["sgd", "toy"])
def test_the_checks_see_a_block_too_few_or_too_many(kernels, fault, name):
    rule = ALL_RULES[name]
    tensors = vectors(rule, [3 * TILE + 1, 5])
    run = Step.update if rule.measure is None else Step.measure
    options = {"tiles_per_block": 1}
    run(Step(kernels, rule, *both(tensors), defaults(rule), **options))
    with pytest.raises(AssertionError):
        run(Step(kernels, rule, *both(tensors), defaults(rule), **options, **{fault: 2}))


@pytest.mark.parametrize("unknown", range(3), ids=["p", "g", "state"])
def test_the_counts_see_an_access_outside(kernels, unknown):
    (streams,) = vectors(RULES["sgd"], [50])
    hyper = [list(map(float, defaults(RULES["sgd"]).values()))]
    before = streams[unknown].clone()
    result = kernels.run(0, [streams], hyper=hyper, unknown=streams[unknown])
    assert result.strays == (50 if unknown == 1 else 100)
    assert torch.equal(streams[unknown], before)

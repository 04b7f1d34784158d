"""The measuring passes of the CUDA kernels' source, run on the CPU (tests/shim)."""

import pytest
import shim
import torch
from cases import LAYOUTS, TILE, TYPES, bits
from shim.steps import (
    ALL_FORMS,
    ALL_RULES,
    ALL_VARIANTS,
    MEASURING,
    NUMBERS,
    Step,
    assert_untouched,
    check,
    copies,
    defaults,
    form_of,
    fresh_kept,
    make,
    vectors,
)

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason=f"no C++ compiler {shim.CXX[0]}")

measuring = pytest.mark.parametrize("rule", MEASURING.values(), ids=MEASURING)
VARIANTS = {key: v for key, v in ALL_VARIANTS.items() if v.name in MEASURING}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
TOY = ALL_RULES["toy"]


@pytest.fixture(scope="session")
def kernels(request):
    return shim.Shim(request.config.cache.mkdir("shim"))


@variants
@pytest.mark.parametrize("per_block", [1, 3])
def test_steps_that_measure_and_steps_that_do_not(kernels, variant, per_block):
    """Numbers and states live on; tensors that are settled lie between others."""
    rule = variant.rule
    tensors = vectors(rule, [2 * TILE + 9, 1, 700, TILE, 0, 5 * TILE, 30])
    tensors[1][1].zero_()  # gradients of which a rule may know nothing yet
    tensors[2][1].fill_(2.0)
    ours, truth = copies(tensors), copies(tensors)
    kept = fresh_kept(rule, len(ours)), fresh_kept(rule, len(ours))
    for seed, updates in enumerate([False, True, True, True]):
        options = {"kept": kept, "seed": seed, "tiles_per_block": per_block}
        step = Step(kernels, rule, ours, truth, variant.hyper, first=[1.0] * 7, **options)
        assert step.measure(updates).launches == 2
        if updates:
            step.update()
        for streams in (*ours, *truth):
            streams[1] += 0.25
    Step(kernels, rule, ours, truth, variant.hyper, kept=kept).update()


def test_settled_tensors_are_left_out(kernels):
    """Decided by numbers on the device: for each tensor, in the middle of a block."""
    rule = MEASURING["sgd_sai"]
    sizes = [3 * TILE + 1, 2 * TILE, 5, TILE, 4 * TILE, 7, 8]
    tensors = vectors(rule, sizes)
    for settled in ({0, 2, 4}, {1, 3, 5}, {0, 1, 2, 3, 4, 5, 6}, set()):
        kept = fresh_kept(rule, len(sizes)), fresh_kept(rule, len(sizes))
        for numbers in kept:
            for i in settled:
                numbers[i][0].fill_(5.0)
                numbers[i][1].fill_(3.0)
        for per_block in (1, 2, 7):
            step = Step(
                kernels,
                rule,
                copies(tensors),
                copies(tensors),
                defaults(rule),
                kept=kept,
                first=[1.0] * 7,
                tiles_per_block=per_block,
            )
            assert {i for i, update in enumerate(step.updates) if update.settled()} == settled
            step.measure(updates=False)
            settled = {i for i, update in enumerate(step.updates) if update.settled()}


@measuring
def test_absent_numbers_read_as_their_initial_values(kernels, rule):
    tensors = vectors(rule, [TILE + 1, 5])
    kept = [[None] * len(rule.kept)] * 2
    check(kernels, rule, tensors, defaults(rule), kept=(kept, kept))


def test_a_rule_that_measures_nothing_is_refused(kernels):
    rule = ALL_RULES["sgd"]
    tensors = vectors(rule, [5])
    hyper = [list(map(float, defaults(rule).values()))]
    result = kernels.run(NUMBERS["sgd"], tensors, hyper=hyper, measures=1)
    assert (result.code, result.launches) == (1, 0)
    assert_untouched(result, tensors)


def test_each_combination_of_types_is_measured_by_kernels_of_its_own(kernels):
    """One after the other, in the same scratch memory."""
    kinds = [TYPES[key] for key in ("f32", "bf16", "f64", "f16", "f32_grad_bf16", "f64_state_f16")]
    tensors = [vectors(TOY, [n], t)[0] for n in (5000, TILE + 1, 0, 1) for t in kinds]
    check(kernels, TOY, tensors, defaults(TOY), launches=len(kinds))
    own = Step(kernels, TOY, tensors, tensors, defaults(TOY)).start_measuring().own_kernels
    assert own == 3


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_states_of_different_types(kernels, form):
    kinds = [torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.bfloat16]
    ((p, g, *states),) = make(TOY, TYPES["f32"], [form])
    states = [LAYOUTS[form.layout](s.to(t)) for s, t in zip(states, kinds, strict=True)]
    check(kernels, TOY, [[p, g, *states]], defaults(TOY), launches=int(p.numel() > 0))


@pytest.mark.parametrize("layout", ["contiguous", "offset", "gaps"])
def test_elements_beyond_32_bits(kernels, layout):
    """The last blocks of a huge tensor, of which no more than their elements is there."""
    before = 2**31 + 5 * TILE
    tensors = make(TOY, TYPES["f64"], [form_of(3 * TILE + 5, layout)])
    whole = Step(kernels, TOY, *[copies(tensors)] * 2, defaults(TOY))
    whole.start_measuring()
    sums = torch.zeros(TOY.measure.sums, before // TILE + 4, dtype=torch.float64)
    tail = Step(kernels, TOY, *[copies(tensors)] * 2, defaults(TOY))
    tail.tensor_scalars = torch.zeros(1, 2, dtype=torch.float64)
    result = tail.run(measures=1, before=before, tile_sums=sums)
    assert (result.code, result.strays) == (0, 0)
    assert all(
        torch.equal(bits(x), bits(y)) for x, y in zip(tail.ours[0], whole.ours[0], strict=True)
    )
    assert torch.equal(bits(sums[:, -4:]), bits(whole.tile_sums))


@pytest.mark.parametrize("stream", range(7))
def test_the_checks_see_a_stream_that_is_read_or_written_too_much(kernels, stream):
    """Where the reference's table of streams is another one than the kernels'."""
    step = Step(kernels, TOY, *[copies(vectors(TOY, [50]))] * 2, defaults(TOY))
    result = step.start_measuring()
    reads = [1, 1, 0, 0, 1, 1, 1][stream]
    writes = int(stream > 3)
    assert result.counts.are(step.streams[0][stream], reads, writes)
    assert not result.counts.are(step.streams[0][stream], 1 - reads, writes)
    assert not result.counts.are(step.streams[0][stream], reads, 1 - writes)

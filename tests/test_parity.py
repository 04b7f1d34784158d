"""Every back-end gives the reference's bits: rule x dtype x layout x shape, at any level."""

import itertools

import pytest
import torch
from cases import (
    BACKENDS,
    EXTENSION,
    FORMS,
    LEVELS,
    RULES,
    STEPS,
    TYPES,
    VARIANTS,
    Form,
    Run,
    Types,
    bits,
    compiled,
    differing,
    forms,
    levels,
    one_thread,  # noqa: F401  a fixture for every test here
    rules,
    types,
    update,
    variants,
)

ALL_FORMS = tuple(form for name, form in FORMS.items() if name != "100003")
LARGE = (Form((300_000,)), *FORMS.values(), Form((301, 997), "transposed", "rows"))
F32, BF16, C64 = (TYPES[key] for key in ("f32", "bf16", "c64"))
some_types = pytest.mark.parametrize("types", [F32, BF16, C64], ids=["f32", "bf16", "c64"])


@pytest.fixture
def use_level():
    before = EXTENSION.cpu_level()
    yield EXTENSION.use_cpu_level
    EXTENSION.use_cpu_level(before)


# --- training --------------------------------------------------------------------------------


@forms
@types
@variants
@compiled
def test_bits_of_the_reference_after_every_step(variant, backend, types, form):
    run, truth = (Run(variant, (form,), types, name) for name in (backend, "reference"))
    for step in range(STEPS):
        assert not differing(run.step(step), truth.step(step)), f"after step {step}"


SWITCHES = list(itertools.permutations(BACKENDS, 2))


@types
@variants
@pytest.mark.parametrize(("one", "other"), SWITCHES, ids=["_then_".join(s) for s in SWITCHES])
def test_another_backend_continues_from_the_checkpoint(variant, types, one, other):
    run = Run(variant, ALL_FORMS, types, one).train(range(2))
    continued = run.continued_by(other).train(range(2, STEPS))
    truth = Run(variant, ALL_FORMS, types, "reference").train()
    assert not differing(continued, truth)


@types
@variants
@levels
def test_every_instruction_level_gives_the_same_bits(variant, types, level, use_level):
    use_level(level)
    assert EXTENSION.cpu_level() == level
    run = Run(variant, ALL_FORMS, types, "cpu").train()
    assert not differing(run, Run(variant, ALL_FORMS, types, "reference").train())


@variants
@some_types
@compiled
def test_any_number_of_threads_gives_the_same_bits(variant, types, backend):
    runs = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        runs.append(Run(variant, LARGE, types, backend).train(range(2)))
    assert not any(differing(run, runs[0]) for run in runs[1:])


@variants
@some_types
@compiled
def test_unscaling_and_maximize(variant, types, backend):
    runs = [Run(variant, ALL_FORMS, types, name) for name in (backend, "reference")]
    for run in runs:
        run.opt.grad_scale = torch.tensor(3.0)  # its reciprocal is not exact
        run.opt.param_groups[0]["maximize"] = True
        run.train()
    assert not differing(*runs)
    assert differing(runs[0], Run(variant, ALL_FORMS, types, backend).train())


@variants
@compiled
@pytest.mark.parametrize("layout", ["gaps", "rows", "offset"])
@some_types
def test_memory_between_the_elements_is_left_alone(variant, backend, layout, types):
    run = Run(variant, (Form((40, 30), layout),), types, backend).train()
    (p,) = run.params
    whole = p.detach().as_strided((p.untyped_storage().nbytes() // p.element_size(),), (1,), 0)
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(False)
    assert outside.any()
    assert (whole[outside] == 7).all()  # what cases.py puts there


# --- the comparison itself -------------------------------------------------------------------

PAIRS = list(itertools.permutations(RULES, 2))


@pytest.mark.parametrize(("name", "other"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
@compiled
def test_another_rule_gives_another_result(name, other, backend):
    """Else the weights have not moved enough for equality to mean anything."""
    run = Run(VARIANTS[name], ALL_FORMS, F32, backend).train()
    control = Run(VARIANTS[other], ALL_FORMS, F32, "reference").train()
    for form, p, q in zip(ALL_FORMS, run.params, control.params, strict=True):
        assert p.numel() == 0 or not torch.equal(bits(p), bits(q)), form


@pytest.mark.parametrize("types", [F32, TYPES["f64"], BF16, TYPES["f16"]], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["param", "state"])
def test_the_comparison_sees_the_last_bit(types, which):
    variant = next(iter(VARIANTS.values()))
    run, other = (Run(variant, (Form((1030,)),), types, "reference").train() for _ in range(2))
    assert not differing(run, other)
    name, tensor = list(run.tensors())[which]
    last = tensor.detach()[-1:]
    last.copy_(torch.nextafter(last, torch.full_like(last, torch.inf)))
    (found,) = differing(run, other)
    assert found.startswith(f"{name}: 1 of 1030 elements differ, by at most ")


# --- what is stored --------------------------------------------------------------------------


def _specials(dtype, count, key):
    """Draws from the values that arithmetic treats specially."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    table = [0.0, 1.0, 1 / 3, info.max, info.tiny, info.tiny / 2, least, torch.inf]
    table = torch.tensor(table, dtype=torch.float64)
    table = torch.cat([table, -table, torch.tensor([torch.nan])]).to(dtype)
    maker = torch.Generator().manual_seed(key)
    return table[torch.randint(len(table), (count,), generator=maker)]


@rules
@levels
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@types
def test_nan_infinity_signed_zero_and_subnormals(rule, level, types, maximize, use_level):
    use_level(level)
    if types.param.is_complex:
        types = Types(torch.float32, None, torch.float64)  # a complex number is two of these
    dtypes = [types.param, types.grad or types.param]
    dtypes += [types.state or torch.promote_types(types.param, torch.float32)] * len(rule.states)
    hyper = next(v.hyper for v in VARIANTS.values() if v.name == rule.name)
    results = []
    for backend in ("cpu", "reference"):
        streams = [_specials(dtype, 20_000, key) for key, dtype in enumerate(dtypes)]
        update(backend, rule, streams, hyper, maximize=maximize)
        results.append([bits(t) for t in streams])
    for k, (ours, truth) in enumerate(zip(*results, strict=True)):
        wrong = (ours != truth).sum().item()
        assert wrong == 0, f"stream {k}: {wrong} elements differ"


def _copy(source, dtype, level, use_level):
    """``source`` stored as ``dtype`` by the CPU kernel: p = -0.0 - 1 (-g) is g, zeros included."""
    use_level(level)
    param = torch.full_like(source, -0.0, dtype=dtype)
    hyper = dict.fromkeys(RULES["sgd"].hyper, 0.0) | {"lr": 1.0}
    update("cpu", RULES["sgd"], [param, source, torch.zeros_like(param)], hyper, maximize=True)
    return param


HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])


@HALVES
@levels
def test_all_65536_halves_are_read_as_torch_reads_them(half, level, use_level):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(half)
    for dtype in (torch.float32, torch.float64):
        read = _copy(patterns, dtype, level, use_level)
        assert torch.equal(bits(read), bits(patterns.to(dtype)))


@levels
def test_halves_are_read_alike_where_subnormals_are_flushed(level, use_level):
    """torch.set_flush_denormal is a thread's own: its loads must give what all others' do."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    whole = patterns.float()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        read = _copy(patterns, torch.float32, level, use_level)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(read), bits(whole))


def _floats():
    """Float32 of every exponent, with every pattern of upper bits, around every rounding tie."""
    low = {0, 1, 2**16 - 1}
    low |= {2**k + d for k in range(1, 17) for d in (-1, 0, 1)}
    low |= {3 * 2**k + d for k in range(1, 15) for d in (-1, 0, 1)}
    low = torch.tensor(sorted(v for v in low if v < 2**16), dtype=torch.int32)
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    return (high[:, None] | low).flatten().view(torch.float32)


@HALVES
@levels
def test_halves_are_rounded_as_torch_rounds_them(half, level, use_level):
    floats = _floats()
    for source in (floats, floats.double()):
        assert torch.equal(bits(_copy(source, half, level, use_level)), bits(source.to(half)))


@levels
@pytest.mark.parametrize("word", [0x7FC0, 0x7FC1, 0x7F81, 0x7FFF], ids=hex)
@pytest.mark.parametrize("sign", [0, 0x8000], ids=["positive", "negative"])
def test_every_nan_is_stored_as_one(word, sign, level, use_level):
    """As torch stores it: quiet, positive, without payload."""
    use_level(level)
    words = torch.full((77,), (word | sign) - (sign << 1), dtype=torch.int16)
    param, grad = words.view(torch.bfloat16), torch.ones(77, dtype=torch.bfloat16)
    hyper = dict.fromkeys(RULES["sgd"].hyper, 0.0) | {"lr": 1.0}
    update("cpu", RULES["sgd"], [param, grad, torch.zeros(77)], hyper)
    assert bits(param).unique().tolist() == [0x7FC0]


def test_every_level_of_this_machine_is_tested():
    assert LEVELS and LEVELS[0] == "baseline"
    assert EXTENSION.cpu_level() == LEVELS[-1], "the best level is the one in use"

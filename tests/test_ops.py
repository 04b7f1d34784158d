"""The functional ops: lists of tensors and slices of flat buffers, checked, traced and compiled."""

import functools

import pytest
import torch
from cases import (
    BACKENDS,
    EXTENSION,
    FORMS,
    LAYOUTS,
    OP_RULES,
    RULES,
    VARIANTS,
    bits,
    one_thread,  # noqa: F401  a fixture for every test here
    op_rules,
    op_variants,
    update,
    values,
)

import fused_momentum as fm
from fused_momentum.backends import Choice

FORMS = [form for form in FORMS.values() if form.shape != (100_003,)]


def _lists(rule, forms=FORMS, dtype=torch.float32):
    """Params, grads and states, none of them zero."""
    return [
        [
            LAYOUTS[form.grad_layout if k == 1 else form.layout](
                values(form.shape, dtype, 100 * k + i)
            )
            for i, form in enumerate(forms)
        ]
        for k in range(2 + len(rule.states))
    ]


def _cloned(lists):
    return [[t.clone() for t in tensors] for tensors in lists]


def _bits(lists):
    return [[bits(t) for t in tensors] for tensors in lists]


def _equal(lists, others):
    return all(
        torch.equal(a, b)
        for tensors, more in zip(lists, others, strict=True)
        for a, b in zip(tensors, more, strict=True)
    )


def _by_reference(rule, lists, hyper, **flags):
    """What the reference makes of copies of the lists."""
    copies = _cloned(lists)
    for streams in zip(*copies, strict=True):
        update("reference", rule, streams, hyper, **flags)
    return _bits(copies)


# --- results ---------------------------------------------------------------------------------


@op_variants
@pytest.mark.parametrize("flag", [None, "first", "maximize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128], ids=str)
def test_in_place_and_functional_give_the_references_bits(variant, flag, dtype):
    rule, hyper = variant.rule, variant.hyper
    flags = {flag: True} if flag else {}
    lists = _lists(rule, dtype=dtype)
    given, expected = _bits(lists), _by_reference(rule, lists, hyper, **flags)
    made = getattr(fm.ops, rule.name)(*lists, **hyper, **flags)
    assert _equal(_bits([made[0], lists[1], *made[1:]]), expected)
    assert _equal(_bits(lists), given), "the functional op has changed what it was given"
    versions = [[t._version for t in tensors] for tensors in lists]
    assert getattr(fm.ops, f"{rule.name}_")(*lists, **hyper, **flags) is None
    assert _equal(_bits(lists), expected)
    for k, (tensors, before) in enumerate(zip(lists, versions, strict=True)):
        moved = [t._version > v for t, v in zip(tensors, before, strict=True)]
        assert not any(moved) if k == 1 else all(moved)


@op_variants
def test_layer_by_layer_over_slices_of_flat_buffers(variant):
    """Start and end of each layer, last layer first, as a backward pass delivers them."""
    rule, op = variant.rule, getattr(fm.ops, f"{variant.name}_")
    layers = [(0, 5), (5, 1030), (1030, 1031), (1033, 4000)]  # two elements belong to none
    whole = [values((4000,), torch.float32, k).clone() for k in range(2 + len(rule.states))]
    expected = [t.clone() for t in whole]
    for start, end in layers:
        update("reference", rule, [t[start:end] for t in expected], variant.hyper)
    before, addresses = [bits(t) for t in whole], [t.data_ptr() for t in whole]
    for start, end in reversed(layers):
        op(*([t[start:end]] for t in whole), **variant.hyper)
    assert [t.data_ptr() for t in whole] == addresses
    for t, e, b in zip(whole, expected, before, strict=True):
        assert torch.equal(bits(t), bits(e))
        assert torch.equal(bits(t)[1031:1033], b[1031:1033])
    assert not torch.equal(bits(whole[0]), before[0])


@op_rules
def test_slices_in_one_call(rule):
    variant, bounds = VARIANTS[rule.name], [(0, 100), (100, 1500), (1500, 2000)]
    one, many = (
        [values((2000,), torch.float32, k).clone() for k in range(2 + len(rule.states))]
        for _ in range(2)
    )
    op = getattr(fm.ops, f"{rule.name}_")
    op(*([t] for t in one), **variant.hyper)
    op(*([t[a:b] for a, b in bounds] for t in many), **variant.hyper)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one, many, strict=True))


OPTIONAL = [
    (rule, i) for rule in OP_RULES.values() for i, s in enumerate(rule.states) if s.when is not None
]


@pytest.mark.parametrize(("rule", "i"), OPTIONAL, ids=[f"{r.name}-{i}" for r, i in OPTIONAL])
def test_a_state_that_is_not_needed_may_be_left_out(rule, i):
    hyper = VARIANTS[rule.name].hyper | {rule.states[i].when: 0.0}
    with_state, without = _lists(rule), _lists(rule)
    before = _bits(with_state)
    op = getattr(fm.ops, f"{rule.name}_")
    op(*with_state, **hyper)
    without[2 + i] = ()
    op(*without, **hyper)
    assert _equal(_bits(with_state[:2]), _bits(without[:2]))
    assert not _equal(_bits(with_state[:1]), before[:1])


@op_rules
def test_a_hyperparameter_that_is_not_given_is_zero(rule):
    lists, others = _lists(rule), _lists(rule)
    op = getattr(fm.ops, f"{rule.name}_")
    op(*lists, lr=0.1)
    op(*others, **dict.fromkeys(rule.hyper, 0.0) | {"lr": 0.1})
    assert _equal(_bits(lists), _bits(others))
    with pytest.raises(TypeError, match="'lr'"):
        op(*lists)
    with pytest.raises(TypeError, match="rate"):
        op(*lists, lr=0.1, rate=0.1)


# --- which back-end runs -----------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch):
    """``chosen(name)`` makes that the choice everywhere; returns what its runs are called with."""

    def make(name):
        calls = []
        monkeypatch.setattr(fm.ops, "choose", lambda *asked: Choice(name, "for this test"))
        monkeypatch.setitem(fm.ops._RUNS, name, lambda *args: calls.append(args))
        return calls

    return make


@op_rules
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_the_chosen_backend_gets_everything_in_one_call(rule, name, chosen):
    calls, lists = chosen(name), _lists(rule, FORMS[1:4])
    versions = [[t._version for t in tensors] for tensors in lists]
    hyper = VARIANTS[rule.name].hyper
    getattr(fm.ops, f"{rule.name}_")(*lists, **hyper, first=True, maximize=True)
    ((given, streams, numbers, multiplier, first),) = calls
    assert (given, numbers) == (rule, [float(hyper[key]) for key in rule.hyper])
    assert (multiplier, first) == (-1.0, True)
    for k, (tensors, others) in enumerate(zip(streams, lists, strict=True)):
        assert [t.data_ptr() for t in tensors] == [t.data_ptr() for t in others]
        # Kernels write past torch, which must be told.
        moved = [t._version - v for t, v in zip(others, versions[k], strict=True)]
        assert moved == [int(k != 1)] * len(others)


def test_the_cuda_kernels_are_asked_where_there_is_a_stream():
    """And say what is missing, with nothing changed, where there is no GPU."""
    if "cuda" in BACKENDS:
        pytest.skip("there is a GPU")
    p, g, m = ([values((5,), torch.float32, k).clone()] for k in range(3))
    before = _bits([p, m])
    hyper = [float(value) for value in VARIANTS["sgd"].hyper.values()]
    with pytest.raises(RuntimeError, match=r"backend='cuda': (this build has no CUDA|the CUDA)"):
        EXTENSION.run_tensors(0, [p, g, m], hyper, 1.0, [0.0], lambda index: 0)
    assert _equal(_bits([p, m]), before)


# --- errors ----------------------------------------------------------------------------------


def _shorter(lists):
    lists[1].pop()


def _overlapping_slices(lists):
    flat = torch.ones(40)
    lists[0][0], lists[0][1] = flat[:20], flat[19:39]
    for k in range(1, len(lists)):
        lists[k][0], lists[k][1] = torch.ones(20), torch.ones(20)


def _state_is_the_parameter(lists):
    lists[2][1] = lists[0][1]


def _same_parameter_twice(lists):
    for tensors in lists:
        tensors[2] = tensors[1]


def _shifted_grad(lists):
    flat = torch.ones(8)
    lists[0][1], lists[1][1] = flat[1:], flat[:-1]


def _grad_is_another_parameter(lists):
    lists[1][1] = lists[0][2]


def _slice_of_another_length(lists):
    lists[1][2] = torch.ones(40)[:8]


def _state_of_another_shape(lists):
    lists[2][2] = torch.ones(6)


def _put(k, i, tensor):
    def change(lists):
        lists[k][i] = tensor

    return change


ERRORS = {
    "fewer_grads": (_shorter, ValueError, r"grads has 2 tensors, params 3"),
    "overlapping": (_overlapping_slices, ValueError, r"params\[0\] and params\[1\] overlap"),
    "aliased": (_state_is_the_parameter, ValueError, r"params\[1\].* overlap"),
    "twice": (_same_parameter_twice, ValueError, r"\[[12]\] and \w+\[[12]\] overlap"),
    "shifted_grad": (_shifted_grad, ValueError, r"overlap in memory; what is written"),
    "grad_of_another": (_grad_is_another_parameter, ValueError, r"params\[2\].* overlap"),
    "grad_length": (_slice_of_another_length, ValueError, r"grads\[2\] has shape \[8\].*\[7\]"),
    "state_length": (_state_of_another_shape, ValueError, r"{state}\[2\] has shape \[6\].*\[7\]"),
    "grad_device": (
        _put(1, 1, torch.ones(7, device="meta")),
        ValueError,
        r"grads\[1\] is on device meta.*cpu",
    ),
    "state_device": (
        _put(2, 1, torch.ones(7, device="meta")),
        ValueError,
        r"{state}\[1\] is on device meta.*cpu",
    ),
    "param_dtype": (
        _put(0, 1, torch.ones(7, dtype=torch.int32)),
        TypeError,
        r"params\[1\] has dtype torch.int32; needed: torch.float32",
    ),
    "grad_dtype": (
        _put(1, 1, torch.ones(7, dtype=torch.int64)),
        TypeError,
        r"grads\[1\] has dtype torch.int64; needed: torch.float32",
    ),
    "grad_complex": (
        _put(1, 1, torch.ones(7, dtype=torch.complex64)),
        TypeError,
        r"grads\[1\] has dtype torch.complex64, its parameter torch.float32",
    ),
    "grad_sparse": (
        _put(1, 1, torch.ones(7).to_sparse()),
        RuntimeError,
        r"grads\[1\] is sparse.*dense",
    ),
}


# Fine where nothing is written in place.
OVERLAPS = ("overlapping", "aliased", "twice", "shifted_grad", "grad_of_another")
ERROR_ROWS = [
    pytest.param(suffix, *row, id=f"{name}-{'in_place' if suffix else 'functional'}")
    for name, row in ERRORS.items()
    for suffix in ("_", "")
    if suffix or name not in OVERLAPS
]


@op_rules
@pytest.mark.parametrize(("suffix", "change", "kind", "message"), ERROR_ROWS)
def test_bad_lists_raise_and_change_nothing(rule, suffix, change, kind, message):
    lists = [[torch.full((7,), k + 1.0) for _ in range(3)] for k in range(2 + len(rule.states))]
    change(lists)
    given = [[t for t in tensors if not t.is_sparse and not t.is_meta] for tensors in lists]
    before = [[t.clone() for t in tensors] for tensors in given]
    with pytest.raises(kind, match=message.format(state=f"{rule.states[0].name}s")):
        getattr(fm.ops, rule.name + suffix)(*lists, **VARIANTS[rule.name].hyper)
    assert _equal(given, before)


@op_rules
def test_a_tensor_is_no_list(rule):
    lists = [torch.ones(2, 3) for _ in range(2 + len(rule.states))]
    with pytest.raises(TypeError, match="params is a tensor; needed: a list of tensors"):
        getattr(fm.ops, f"{rule.name}_")(*lists, **VARIANTS[rule.name].hyper)


@op_rules
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cpu", "reference")])
@pytest.mark.parametrize("space", [fm.ops, torch.ops.fused_momentum], ids=["ours", "torch.ops"])
def test_what_the_functional_op_returns_has_no_history(rule, backend, space, monkeypatch):
    monkeypatch.setattr(fm.ops, "choose", lambda *asked: Choice(backend, "for this test"))
    lists = [[torch.ones(3, requires_grad=True)] for _ in range(2 + len(rule.states))]
    hyper = VARIANTS[rule.name].hyper | {"first": False, "maximize": False}
    made = getattr(space, rule.name)(*lists, **hyper)
    assert not any(t.requires_grad for tensors in made for t in tensors)


@op_rules
def test_the_functional_op_takes_tensors_that_share_memory(rule):
    one = [torch.ones(3)]
    lists = [one * 2 for _ in range(2 + len(rule.states))]
    made = getattr(fm.ops, rule.name)(*lists, **VARIANTS[rule.name].hyper)
    assert _equal(made, getattr(fm.ops, rule.name)(*_cloned(lists), **VARIANTS[rule.name].hyper))


@op_rules
def test_an_expanded_tensor_is_not_written(rule):
    lists = _lists(rule, FORMS[1:4])
    one = torch.ones(1)
    lists[0][1] = one.expand(7)
    with pytest.raises(RuntimeError, match=r"params\[1\] has elements that share memory"):
        getattr(fm.ops, f"{rule.name}_")(*lists, **VARIANTS[rule.name].hyper)
    assert one == 1


@op_rules
def test_states_that_are_needed_cannot_be_left_out(rule):
    for i, state in enumerate(rule.states):
        lists = _lists(rule)
        lists[2 + i] = ()
        before = _bits(lists)
        with pytest.raises(ValueError, match=f"{state.name}s (has 0 tensors|is empty)"):
            getattr(fm.ops, f"{rule.name}_")(*lists, **VARIANTS[rule.name].hyper)
        assert _equal(_bits(lists), before)


# --- torch.library ---------------------------------------------------------------------------


@op_rules
@pytest.mark.parametrize("name", ["", "_"], ids=["functional", "in_place"])
def test_opcheck(rule, name):
    op = getattr(torch.ops.fused_momentum, rule.name + name).default
    lists = [[t.contiguous() for t in tensors] for tensors in _lists(rule, FORMS[1:4])]
    hyper = {key: float(value) for key, value in VARIANTS[rule.name].hyper.items()}
    torch.library.opcheck(op, tuple(lists), {**hyper, "first": False, "maximize": True})


@op_rules
@pytest.mark.parametrize("name", ["", "_"], ids=["functional", "in_place"])
def test_compiled_without_a_graph_break(rule, name):
    torch._dynamo.reset()
    forms = [form for form in FORMS if form.layout == form.grad_layout == "contiguous"]
    op = functools.partial(getattr(fm.ops, rule.name + name), **VARIANTS[rule.name].hyper)

    def doubled(lists):
        lists = [[t * 2 for t in tensors] for tensors in lists]
        made = op(*lists)
        return lists, made

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        lists, made = doubled(_lists(rule, forms))
        others, made_too = compiled(_lists(rule, forms))
        assert _equal(_bits(lists), _bits(others))
        assert made is made_too is None or _equal(_bits(made), _bits(made_too))


def test_every_rule_of_one_pass_has_its_ops():
    rules = [name for name, rule in RULES.items() if not rule.kept and rule.read is None]
    assert list(OP_RULES) == rules
    names = {name for rule in rules for name in (rule, f"{rule}_")}
    assert names == set(fm.ops.__all__)
    assert all(getattr(fm.ops, name).__doc__ for name in names)

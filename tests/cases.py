"""The one table: rules, hyper-parameters, back-ends, dtypes, shapes, layouts; and runs over it.

Everything here follows from the rule table, so a new rule takes part in every test without an edit.
"""

import functools
import inspect
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch.nn import Parameter

import fused_momentum
from fused_momentum import native, reference
from fused_momentum.backends import PREFERENCE, choose
from fused_momentum.rules import RULES

STEPS = 4
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size
EXTENSION, _ = native.load()
TILE = EXTENSION.TILE if EXTENSION else 1024  # elements; where kernels begin a new piece of work
BACKENDS = [row.name for row in fused_momentum.backends() if row.available]
LEVELS = EXTENSION.cpu_levels() if EXTENSION else []
CLASSES = {
    member.rule.name: member
    for member in vars(fused_momentum).values()
    if isinstance(member, type) and issubclass(member, torch.optim.Optimizer)
}


def device_of(backend):
    """The kind of device that a back-end is tested on."""
    try:
        choose(backend, "cpu")
    except RuntimeError:
        return "cuda"
    return "cpu"


# --- hyper-parameters ------------------------------------------------------------------------

# None is at a value where it would have no effect, and none but the decay is a power of two.
VALUES = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "lookahead_momentum": 0.7}
OTHER_VALUE = 0.3


def switches(rule):
    """Those hyper-parameters of a rule that are on or off."""
    if rule.name not in CLASSES:
        return []  # test_rules.py names it
    arguments = inspect.signature(CLASSES[rule.name]).parameters
    return [
        key for key in rule.hyper if key in arguments and isinstance(arguments[key].default, bool)
    ]


def _words(rule):
    """Values of those hyper-parameters that are words; together, the rows show every word."""
    rows = range(max(map(len, rule.choices.values()), default=1))
    return [{key: words[k % len(words)] for key, words in rule.choices.items()} for k in rows]


# A rule that makes its numbers of other settings has rows of those; the first shows every state.
_AUTOSGM = {
    "lr": 0.1,
    "lr_cfg": (True, 0.1, 2),
    "beta_cfg": (0.7, 0.6, 0.9, 0.3, 0, True),
    "rc_cfg": (1, 0, 0.1, 2, 0, 3, 1, 1, 0),
    "wd_cfg": (0.05, 1),
    "eps_cfg": (1e-3,),
    "compat": "fixed",
}
SETTINGS = {
    "autosgm": {
        "": _AUTOSGM,
        "unity": _AUTOSGM
        | {"lr_cfg": (True, 0.1, 0), "beta_cfg": (0.7, 0.6, 0, 0, 1, False), "compat": "v1"},
        "moment": _AUTOSGM | {"lr_cfg": (True, 0.1, 3), "wd_cfg": (0.05, 0)},
        "limited": _AUTOSGM | {"lr_cfg": (True, 0.1, 4), "beta_cfg": (0.99, 0.6, 0.9, -1, 0, True)},
    }
}


def accepted(cls, **keywords):
    """Those of torch's keywords that the class has."""
    return {key: keywords[key] for key in inspect.signature(cls).parameters if key in keywords}


def _variants():
    """Every rule, with every combination of its switches, and with every one of its words."""
    for rule in RULES.values():
        if rule.read is not None:
            continue
        values = {key: VALUES.get(key, OTHER_VALUE) for key in rule.hyper}
        keys, (words, *others) = switches(rule), _words(rule)
        settings = [
            words | dict(zip(keys, setting, strict=True))
            for setting in itertools.product([False, True], repeat=len(keys))
        ]
        for setting in settings + [settings[0] | other for other in others]:
            # The plain one bears the rule's name.
            on = [key for key in keys if setting[key]]
            changed = [setting[key] for key in words if setting[key] != words[key]]
            yield "-".join([rule.name, *on, *changed]), Variant(rule.name, values | setting)
    for name, rows in SETTINGS.items():
        for key, settings in rows.items():
            yield "-".join(filter(None, [name, key])), Variant(name, settings)


@dataclass(frozen=True)
class Variant:
    """A rule and a value for each of its hyper-parameters, or settings that it makes them of."""

    name: str
    hyper: dict

    @property
    def rule(self):
        return RULES[self.name]


VARIANTS = dict(_variants())
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
# Rules whose step is one elementwise pass are functions too.
OP_RULES = {name: rule for name, rule in RULES.items() if name in fused_momentum.ops.__all__}
OP_VARIANTS = {name: variant for name, variant in VARIANTS.items() if variant.name in OP_RULES}
op_rules = pytest.mark.parametrize("rule", OP_RULES.values(), ids=OP_RULES)
op_variants = pytest.mark.parametrize("variant", OP_VARIANTS.values(), ids=OP_VARIANTS)
backends = pytest.mark.parametrize("backend", BACKENDS)
levels = pytest.mark.parametrize("level", LEVELS)
compiled = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])

# --- dtypes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Types:
    """Dtypes of a parameter, its states (None: the default) and its gradient (None: the same)."""

    param: torch.dtype
    state: torch.dtype | None = None
    grad: torch.dtype | None = None


TYPES = {
    "f32": Types(torch.float32),
    "f64": Types(torch.float64),
    "bf16": Types(torch.bfloat16),
    "f16": Types(torch.float16),
    "c64": Types(torch.complex64),
    "c128": Types(torch.complex128),
    "bf16_state_bf16": Types(torch.bfloat16, torch.bfloat16),
    "f16_state_f16": Types(torch.float16, torch.float16),
    "f32_state_bf16": Types(torch.float32, torch.bfloat16),
    "f32_state_f64": Types(torch.float32, torch.float64),
    "f64_state_f32": Types(torch.float64, torch.float32),
    "f64_state_f16": Types(torch.float64, torch.float16),
    "f32_grad_bf16": Types(torch.float32, None, torch.bfloat16),
    "bf16_grad_f32": Types(torch.bfloat16, None, torch.float32),
    "f64_grad_f16": Types(torch.float64, None, torch.float16),
    "c64_grad_c128": Types(torch.complex64, None, torch.complex128),
}
types = pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)

# --- shapes and layouts ----------------------------------------------------------------------


def _gaps(t):
    """Every second element of a larger tensor."""
    return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]


def _rows(t):
    """The left part of a wider matrix: rows are dense, with gaps between them."""
    return torch.cat([t, torch.full_like(t[..., :3], 7)], -1)[..., : t.shape[-1]]


def _offset(t):
    """Starts one element into its memory, so no vector load of it is aligned."""
    return torch.cat([t.new_full((1,), 7), t.flatten()])[1:].view(t.shape)


def _lazy(t):
    """A view that is conjugated or negated only when it is read."""
    return t.conj().resolve_conj().conj() if t.is_complex() else torch._neg_view(-t)


LAYOUTS = {
    "contiguous": torch.clone,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "reversed": lambda t: (
        t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))
    ),
    "gaps": _gaps,
    "rows": _rows,
    "offset": _offset,
    "lazy": _lazy,
}


@dataclass(frozen=True)
class Form:
    """Shape of a parameter, and how it and its gradient lie in memory."""

    shape: tuple
    layout: str = "contiguous"
    grad_layout: str = "contiguous"


SIZES = [0, 1, 7, TILE - 1, TILE, TILE + 1, 100_003]
FORMS = {str(n): Form((n,)) for n in SIZES} | {
    "scalar": Form(()),
    "4d": Form((3, 5, 1, 9)),
    "empty_4d": Form((3, 0, 2, 2), "channels_last"),
    "channels_last": Form((5, 6, 7, 3), "channels_last", "channels_last"),
    "channels_last_grad": Form((5, 6, 7, 3), "contiguous", "channels_last"),
    "transposed": Form((33, 65), "transposed", "transposed"),
    "transposed_grad": Form((33, 65), "contiguous", "transposed"),
    "mixed_strides": Form((4, 5, 6, 7), "transposed", "reversed"),
    "gaps": Form((2051,), "gaps", "gaps"),
    "gaps_grad": Form((40, 30), "contiguous", "gaps"),
    "rows": Form((40, 30), "rows", "transposed"),
    "offset": Form((2051,), "offset", "offset"),
    "offset_grad": Form((2051,), "contiguous", "offset"),
    "lazy_grad": Form((40, 30), "contiguous", "lazy"),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@functools.cache
def values(shape, dtype, key):
    """Normal random numbers, the same for the same arguments."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(key))


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, unless a test asks for more: waiting threads are slow beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- runs ------------------------------------------------------------------------------------


class Run:
    """Parameters of given forms trained by a back-end on given gradients."""

    def __init__(self, variant, forms, types, backend, state_dict=None, params=None, **more):
        self.variant, self.forms, self.types, self.backend = variant, forms, types, backend
        device = device_of(backend)
        self.params = params or [
            Parameter(LAYOUTS[form.layout](values(form.shape, types.param, i).to(device)))
            for i, form in enumerate(forms)
        ]
        self.opt = CLASSES[variant.name](
            self.params, lr=1.0, state_dtype=types.state, backend=backend, **more
        )
        if state_dict is not None:
            self.opt.load_state_dict(state_dict)

    def grads(self, step):
        """Freshly laid-out gradients of a step."""
        dtype = self.types.grad or self.types.param
        for i, (form, p) in enumerate(zip(self.forms, self.params, strict=True)):
            key = 1000 * (step + 1) + i
            yield LAYOUTS[form.grad_layout](values(form.shape, dtype, key).to(p.device))

    def step(self, step):
        """One step; checks that the gradients are the same tensors with the same bits after it."""
        given = list(self.grads(step))
        for p, grad in zip(self.params, given, strict=True):
            p.grad_dtype = None  # a gradient may have another dtype
            p.grad = grad
        for group in self.opt.param_groups:
            group.update(self.variant.hyper)
        self.opt.step()
        for p, grad, fresh in zip(self.params, given, self.grads(step), strict=True):
            assert p.grad is grad
            assert torch.equal(bits(grad), bits(fresh)), "the step has changed a gradient"
        return self

    def train(self, steps=range(STEPS)):
        for step in steps:
            self.step(step)
        return self

    def continued_by(self, backend):
        """The same training from here on, by an optimizer that loads this one's checkpoint."""
        state_dict, params = self.opt.state_dict(), self.params
        if (device := device_of(backend)) != device_of(self.backend):
            pairs = zip(self.forms, params, strict=True)
            params = [Parameter(LAYOUTS[f.layout](p.detach().to(device))) for f, p in pairs]
        return Run(self.variant, self.forms, self.types, backend, state_dict, params)

    def tensors(self):
        """Every parameter and every state that is a tensor, by name."""
        for i, p in enumerate(self.params):
            yield f"params[{i}]", p
            for key, state in sorted(self.opt.state.get(p, {}).items()):
                if isinstance(state, torch.Tensor):
                    yield f"{key} of params[{i}]", state


def nested_parameter(layout):
    """A parameter that is a nested tensor, with its gradient."""
    p = Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout))
    torch.nested.to_padded_tensor(p, 0.0).sum().backward()
    return p


def bits(tensor):
    """The bits of a tensor as integers, all NaN made one.

    IEEE 754 leaves the sign and payload of a NaN to the processor: x86 takes those of an operand,
    and which one comes first is the compiler's choice.
    """
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    real = real.detach().resolve_neg().cpu().contiguous()
    integer = INTEGERS[real.element_size()]
    return torch.where(real.isnan(), torch.nan, real).view(integer)


def same_bits(x, y):
    """Whether all bits are the same, all NaN being one; the short way first."""
    integer = INTEGERS[x.element_size()]
    return torch.equal(x.view(integer), y.view(integer)) or torch.equal(bits(x), bits(y))


def differing(run, other):
    """The tensors that differ between two runs, in dtype, strides or bits, and by how much."""
    mine, others = dict(run.tensors()), dict(other.tensors())
    assert mine.keys() == others.keys()
    found = []
    for name, t in mine.items():
        o = others[name]
        if (t.dtype, t.stride()) != (o.dtype, o.stride()):
            found.append(f"{name}: {t.dtype} {t.stride()}, not {o.dtype} {o.stride()}")
        elif not torch.equal(bits(t), bits(o)):
            count = int((bits(t) != bits(o)).sum())
            most = float((t.detach().cpu() - o.detach().cpu()).abs().max())
            found.append(f"{name}: {count} of {t.numel()} elements differ, by at most {most:.3g}")
    return found


def update(backend, rule, streams, hyper, *, first=False, maximize=False, kept=None):
    """One update of given streams p, g, states, in place, by a back-end without an optimizer.

    A rule that is no function is updated by its class; the numbers that it keeps are in ``kept``.
    """
    moved = [t.to(device_of(backend)) for t in streams]
    if rule.name not in OP_RULES:
        _update_by_class(backend, rule, moved, hyper, maximize, {} if kept is None else kept)
    elif backend == "reference":
        sign = -1.0 if maximize else 1.0
        p, g, *states = moved
        reference.update(rule, p, g, states, hyper.values(), grad_multiplier=sign, first=first)
    else:
        op = getattr(fused_momentum.ops, f"{rule.name}_")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PREFERENCE, device_of(backend), (backend,))
            op(*([t] for t in moved), **hyper, first=first, maximize=maximize)
    for t, result in zip(streams, moved, strict=True):
        t.copy_(result)


def _update_by_class(backend, rule, streams, hyper, maximize, kept):
    values, grad, *states = streams
    p = Parameter(values)
    p.grad_dtype = None  # a gradient may have another dtype
    p.grad = grad
    optimizer = CLASSES[rule.name]([p], lr=1.0, backend=backend)
    optimizer.param_groups[0].update(hyper, maximize=maximize)
    names = [s.name for s in rule.states]
    optimizer.state[p] = dict(zip(names, states, strict=True)) | kept
    optimizer.step()
    kept.update((key, t) for key, t in optimizer.state[p].items() if key not in names)

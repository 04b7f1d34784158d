"""The rules: numbers worked by hand, exact arithmetic, and the two tables side by side."""

import itertools
from fractions import Fraction

import pytest
import torch
from cases import (
    BACKENDS,
    CLASSES,
    EXTENSION,
    RULES,
    VARIANTS,
    backends,
    bits,
    device_of,
    one_thread,  # noqa: F401  a fixture for every test here
    rules,
    switches,
    update,
    values,
)
from torch.nn import Parameter

from fused_momentum.checks import OPTIONAL_KEYS

# --- the tables ------------------------------------------------------------------------------


def test_every_rule_has_its_twin_in_the_extension():
    twins = {row.name: row for row in EXTENSION.rules()}
    missing = [name for name in RULES if name not in twins]
    assert not missing, f"rules without a twin in csrc/rules.h: {missing}"
    assert list(twins) == list(RULES), "csrc/rules.h lists other rules, or another order"
    for rule in RULES.values():
        twin, measure = twins[rule.name], rule.measure
        ours = [len(rule.hyper), len(rule.tensor_scalars), len(rule.states), len(rule.kept)]
        ours += [measure.sums, measure.settles] if measure else [0, False]
        theirs = [twin.hyper, twin.tensor_scalars, twin.states, twin.kept, twin.sums, twin.settles]
        assert ours == theirs, f"{rule.name}: hyper, tensor scalars, states, kept, sums, settles"
        assert {k.dtype for k in rule.kept} <= {f"float{8 * twin.kept_itemsize}"}


def _arguments(function):
    return function.__code__.co_varnames[: function.__code__.co_argcount]


@rules
def test_a_row_agrees_with_its_functions(rule):
    assert rule.name in CLASSES, (
        f"no class exported by fused_momentum/optimizers/__init__.py has the rule {rule.name}"
    )
    param = torch.nn.Parameter(torch.ones(1))
    if rule.read is None:
        group = CLASSES[rule.name]([param], lr=0.1).param_groups[0]
        keys = {*group, *OPTIONAL_KEYS}
        assert set(rule.hyper) <= keys, "hyper names keys that its class gives no group"
    states, kept = [s.name for s in rule.states], tuple(k.name for k in rule.kept)
    numbers = rule.hyper + rule.tensor_scalars + kept
    assert _arguments(rule.derive) == numbers
    assert len(rule.derive(*[0.5] * len(numbers))) == len(rule.scalars)
    names = _arguments(rule.update)
    assert names[:2] == ("p", "g")
    assert names[2 + len(states) :] == rule.scalars
    assert len(rule.update(*[0.5] * len(names))) == 1 + len(rule.written)
    assert {s.when for s in (*rule.states, *rule.kept)} <= {None, *rule.hyper}
    assert set(rule.choices) <= set(rule.hyper)
    measure = rule.measure
    for part in (rule, measure) if measure else (rule,):
        if part.reads is not None:
            assert _arguments(part.reads) == rule.scalars
            assert len(part.reads(*[0.5] * len(rule.scalars))) == 2 + len(states)
    if measure is None:
        return
    assert _arguments(measure.terms) == names
    assert len(measure.terms(*[0.5] * len(names))) == len(measure.writes) + measure.sums
    assert set(measure.writes) <= set(states)
    assert _arguments(measure.settled) == rule.hyper + kept
    settle = _arguments(measure.settle)
    assert settle[: -measure.sums] == (*rule.hyper, "numel", "updates", *kept)
    assert len(measure.settle(*[0.5] * len(settle))) == len(rule.tensor_scalars) + len(kept)


# --- numbers worked by hand ------------------------------------------------------------------


@backends
@rules
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_numbers_worked_by_hand(rule, backend, dtype):
    """Sums of a few powers of two, so they are exact in every dtype."""
    device = device_of(backend)
    hyper, (_, start), *steps = rule.worked
    p = Parameter(torch.tensor(start, dtype=dtype, device=device))
    optimizer = CLASSES[rule.name]([p], **hyper, backend=backend)
    assert len(steps) >= 2
    for t, (g, *expected) in enumerate(steps):
        p.grad = torch.tensor(g, dtype=dtype, device=device)
        optimizer.step()
        held = optimizer.state[p]
        tensors = [p, *(held[s.name] for s in rule.states if s.name in held)]
        assert [tensor.tolist() for tensor in tensors] == expected, f"step {t}"


# --- everything matters ----------------------------------------------------------------------


def _train(rule, backend, hyper, zero_first=False):
    """Bits of parameter and states after three updates, the first of them the first."""
    p, kept = values((64,), torch.float32, 0).clone(), {}
    states = [torch.zeros(64) for _ in rule.states]
    for t in range(3):
        grad = values((64,), torch.float32, t + 1).clone()
        if zero_first and t == 0:
            grad.zero_()
        update(backend, rule, [p, grad, *states], hyper, first=t == 0, kept=kept)
    return [bits(tensor) for tensor in (p, *states)]


def _others(rule, key, value):
    """Other values of a hyper-parameter."""
    if key in rule.choices:
        return [word for word in rule.choices[key] if word != value]
    return [not value] if key in switches(rule) else [value * 0.5]


# Hyper-parameters that a word leaves without effect; of a single tensor, G is the largest.
IDLE = {("scale", "sqrt_numel"): {"eps"}, ("scale", "gsnr_max"): {"eps"}}


# Those with settings of another kind have this test of their own.
numbered = pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if not v.rule.read])


@backends
@numbered
def test_every_hyperparameter_matters(variant, backend):
    rule, hyper = variant.rule, variant.hyper
    idle = {key for word in hyper.items() for key in IDLE.get(word, ())}
    base = _train(rule, backend, hyper), _train(rule, backend, hyper, zero_first=True)
    assert all(map(torch.equal, base[0], _train(rule, backend, hyper)))
    for key, value in hyper.items():
        matters = False
        for other, zero_first in itertools.product(_others(rule, key, value), (False, True)):
            changed = _train(rule, backend, hyper | {key: other}, zero_first)
            matters |= not torch.equal(base[zero_first][0], changed[0])
        assert matters != (key in idle), f"{key}, instead of {value}"


@backends
@rules
def test_maximize_is_the_negated_gradient(rule, backend):
    results = []
    for sign, maximize in ((1, False), (-1, True), (1, True)):
        streams = [values((64,), torch.float32, k).clone() for k in range(2)]
        streams += [values((64,), torch.float32, 2 + k).abs() for k in range(len(rule.states))]
        streams[1] *= sign
        update(backend, rule, streams, VARIANTS[rule.name].hyper, maximize=maximize)
        results.append(bits(streams[0]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@rules
def test_every_scalar_and_every_stream_matters(rule):
    """Changing any argument of the rule's functions changes one of their results."""
    functions = [rule.update, *([rule.measure.terms] if rule.measure else [])]
    names = rule.update.__code__.co_varnames[: rule.update.__code__.co_argcount]
    given = [0.3 + 0.1 * i for i in range(len(names))]
    for i, name in enumerate(names):
        assert any(
            function(*given[:i], new, *given[i + 1 :]) != function(*given)
            for new in (0.0, given[i] / 2)
            for function in functions
        ), f"{name} changes nothing"


# --- against exact arithmetic ----------------------------------------------------------------
# Each model tells a rule in another form than rules.py, in exact fractions.


def _exact_sgd(p, grads, h):
    """The buffer as a sum over all gradients so far, and no recursion."""
    seen = []
    for t, grad in enumerate(grads):
        seen.append(grad + h["coupled"] * p)
        kept = [h["momentum"] ** (t - s) for s in range(t + 1)]
        share = [1 if s == 0 else 1 - h["dampening"] for s in range(t + 1)]
        m = sum(k * w * g for k, w, g in zip(kept, share, seen, strict=True))
        d = seen[-1] + h["momentum"] * m if h["nesterov"] else m
        p = (1 - h["lr"] * h["decoupled"]) * p - h["lr"] * d
    return p, m


def _exact_velocity(p, grads, h):
    """The velocity as -lr times the sum over all gradients so far."""
    seen = []
    for grad in grads:
        seen.append(grad + h["coupled"] * p)
        v = -h["lr"] * sum(h["momentum"] ** k * g for k, g in enumerate(reversed(seen)))
        p = (1 - h["lr"] * h["decoupled"]) * p + v
    return p, v


def _exact_lookahead(p, grads, h):
    """The iterate x apart from the point ahead of it, where the gradient is taken."""
    x, v = p, 0
    for grad in grads:
        v = h["momentum"] * v - h["lr"] * (grad + h["coupled"] * (x + h["lookahead_momentum"] * v))
        x = (1 - h["lr"] * h["decoupled"]) * x + v
    return x + h["momentum"] * v, v


EXACT = {"sgd": _exact_sgd, "velocity": _exact_velocity, "lookahead": _exact_lookahead}
EXACT_VARIANTS = {name: v for name, v in VARIANTS.items() if v.name in EXACT}
T = 6


def _exact(variant, start, grads):
    """Exact parameter and state after all gradients; every float64 is a fraction as it stands."""
    h = {key: Fraction(value) for key, value in variant.hyper.items()}
    if "lookahead_momentum" in h:
        h["lookahead_momentum"] = h["momentum"]
    h["coupled"] = h["weight_decay"] * (1 - h["decoupled_weight_decay"])
    h["decoupled"] = h["weight_decay"] * h["decoupled_weight_decay"]
    columns = zip(start.tolist(), *(g.tolist() for g in grads), strict=True)
    exact = [EXACT[variant.name](*_fractions(column), h) for column in columns]
    return list(zip(*exact, strict=True))


def _fractions(column):
    first, *rest = map(Fraction, column)
    return first, rest


@backends
@pytest.mark.parametrize("variant", EXACT_VARIANTS.values(), ids=EXACT_VARIANTS)
def test_float64_against_exact_arithmetic(variant, backend):
    rule = variant.rule
    start, *grads = (values((16,), torch.float64, key) for key in range(T + 1))
    p, state = start.clone(), torch.zeros_like(start)
    hyper = variant.hyper | (
        {"lookahead_momentum": variant.hyper["momentum"]}
        if "lookahead_momentum" in variant.hyper
        else {}
    )
    largest = start.abs().max().item()
    for t, grad in enumerate(grads):
        update(backend, rule, [p, grad, state], hyper, first=t == 0)
        largest = max([largest, *(x.abs().max().item() for x in (p, grad, state))])
    limit = _limit(largest)
    for name, ours, exact in zip("pm", (p, state), _exact(variant, start, grads), strict=True):
        error = max(abs(Fraction(a) - b) for a, b in zip(ours.tolist(), exact, strict=True))
        assert error <= limit, f"{name}: {float(error):.2e} > {float(limit):.2e}"


def _limit(largest):
    """How far T steps of float64 may be from exact arithmetic, where no value exceeds ``largest``.

    A step rounds at most 16 times (3 derived scalars, at most 10 operations of the rule; storing is
    exact), each by half an ulp, 2^-53, of a value below 2 ``largest`` (g + wd p at most). An error
    that is there before a step grows by less than 4 in it. Look-ahead grows most: its x is within
    1 + mu of the greater of |p| and |v|, the new v within mu + lr wd < 1, the new x within 2 + mu,
    p within 2 + 2 mu < 4. So T steps add up to less than 4^T times the error of one.
    """
    return 4**T * 16 * 2 * Fraction(largest) * Fraction(1, 2**53)


def test_the_exact_models_tell_rules_apart():
    start, grads = (
        values((4,), torch.float64, 0),
        [values((4,), torch.float64, 1 + t) for t in range(T)],
    )
    results = {name: _exact(v, start, grads)[0] for name, v in EXACT_VARIANTS.items()}
    assert len(set(results.values())) == len(EXACT_VARIANTS)
    limit = _limit(8)
    for name, p in results.items():
        for other, q in results.items():
            gap = max(abs(a - b) for a, b in zip(p, q, strict=True))
            assert name == other or gap > 1000 * limit


def test_backends_of_this_run():
    assert BACKENDS[:2] == ["reference", "cpu"], "the extension is part of what is tested"

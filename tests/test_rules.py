"""The rules: numbers worked by hand, exact arithmetic, and the two tables side by side."""

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
    variants,
)
from torch.nn import Parameter

# --- the tables ------------------------------------------------------------------------------


def test_every_rule_has_its_twin_in_the_extension():
    twins = {row.name: row for row in EXTENSION.rules()}
    missing = [name for name in RULES if name not in twins]
    assert not missing, f"rules without a twin in csrc/rules.h: {missing}"
    assert list(twins) == list(RULES), "csrc/rules.h lists other rules, or another order"
    for rule in RULES.values():
        twin = twins[rule.name]
        counts = (twin.hyper, twin.tensor_scalars, twin.states, twin.sums)
        needed = (len(rule.hyper), len(rule.tensor_scalars), len(rule.states), rule.sums)
        assert counts == needed, f"{rule.name}: hyper, tensor scalars, states, sums"


@rules
def test_a_row_agrees_with_its_functions(rule):
    assert rule.name in CLASSES, f"no optimizer class has the rule {rule.name}"
    arguments = rule.hyper + rule.tensor_scalars
    assert rule.derive.__code__.co_varnames[: rule.derive.__code__.co_argcount] == arguments
    assert len(rule.derive(*[0.5] * len(arguments))) == len(rule.scalars)
    names = rule.update.__code__.co_varnames[: rule.update.__code__.co_argcount]
    assert names[:2] == ("p", "g")
    assert names[2 + len(rule.states) :] == rule.scalars
    assert len(rule.update(*[0.5] * len(names))) == 1 + len(rule.states) + rule.sums
    assert {s.when for s in rule.states} <= {None, *rule.hyper}


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
        tensors = [p, *(optimizer.state[p][s.name] for s in rule.states)]
        assert [tensor.tolist() for tensor in tensors] == expected, f"step {t}"


# --- everything matters ----------------------------------------------------------------------


def _train(rule, backend, hyper):
    """Bits of parameter and states after three updates, the first of them the first."""
    p = values((64,), torch.float32, 0).clone()
    states = [torch.zeros(64) for _ in rule.states]
    for t in range(3):
        grad = values((64,), torch.float32, t + 1)
        update(backend, rule, [p, grad, *states], hyper, first=t == 0)
    return [bits(tensor) for tensor in (p, *states)]


@backends
@variants
def test_every_hyperparameter_matters(variant, backend):
    rule, hyper = variant.rule, variant.hyper
    base = _train(rule, backend, hyper)
    assert all(map(torch.equal, base, _train(rule, backend, dict(hyper))))
    for key, value in hyper.items():
        other = not value if key in switches(rule) else value * 0.5
        changed = _train(rule, backend, hyper | {key: other})
        assert not torch.equal(base[0], changed[0]), f"{key} {value} -> {other} changes nothing"


@backends
@rules
def test_maximize_is_the_negated_gradient(rule, backend):
    results = []
    for sign, maximize in ((1, False), (-1, True), (1, True)):
        streams = [values((64,), torch.float32, k).clone() for k in range(2 + len(rule.states))]
        streams[1] *= sign
        update(backend, rule, streams, VARIANTS[rule.name].hyper, maximize=maximize)
        results.append(bits(streams[0]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@rules
def test_every_scalar_and_every_stream_matters(rule):
    """Changing any argument of the rule's function changes one of its results."""
    names = rule.update.__code__.co_varnames[: rule.update.__code__.co_argcount]
    given = [0.3 + 0.1 * i for i in range(len(names))]
    base = rule.update(*given)
    for i, name in enumerate(names):
        changed = [rule.update(*given[:i], new, *given[i + 1 :]) for new in (0.0, given[i] / 2)]
        assert any(result != base for result in changed), f"{name} changes nothing"


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

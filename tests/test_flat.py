"""Flat buffers: where states, parameters and gradients lie, and that saving one is small."""

import copy
import io
import pickle

import pytest
import torch
from cases import (
    FORMS,
    TYPES,
    VARIANTS,
    Run,
    backends,
    differing,
    one_thread,  # noqa: F401  a fixture for every test here
    rules,
)

import fused_momentum

ALIGNMENT = 128  # bytes
ALL = tuple(FORMS.values())


def _run(rule, types="f32", backend="cpu", **more):
    return Run(VARIANTS[rule.name], ALL, TYPES[types], backend, **more).train(range(2))


def _states(run):
    """All but the numbers, which lie in a buffer of their own."""
    return [run.opt.state[p][s.name] for s in run.variant.rule.states for p in run.params]


def _assert_one_range(tensors):
    """They follow each other at multiples of 128 bytes, with no more room than that takes."""
    end = None
    for t in sorted((t for t in tensors if t.numel()), key=torch.Tensor.data_ptr):
        begin = t.data_ptr()
        assert end is None or begin == end
        end = begin + -(-t.nbytes // ALIGNMENT) * ALIGNMENT


@rules
@backends
@pytest.mark.parametrize("types", ["f32", "bf16", "bf16_state_bf16", "f64", "c64"])
def test_states_lie_in_one_range(rule, types, backend):
    run = _run(rule, types, backend)
    for state in rule.states:
        states = [run.opt.state[p][state.name] for p in run.params]
        assert all(s.shape == p.shape for s, p in zip(states, run.params, strict=True))
    _assert_one_range(_states(run))


@rules
def test_saving_one_state_is_small(rule):
    run = _run(rule)
    index = next(i for i, p in enumerate(run.params) if p.numel() == 1)
    for state in run.opt.state[run.params[index]].values():
        file = io.BytesIO()
        torch.save(state, file)
        # 4 bytes and the containers of torch.save; all states together are above 400,000.
        assert len(file.getvalue()) < 4096
        assert len(pickle.dumps(state)) < 4096
        assert copy.deepcopy(state).untyped_storage().nbytes() == state.element_size()


@rules
@backends
def test_a_loaded_state_is_flat_again(rule, backend):
    run = _run(rule, backend=backend)
    scattered = copy.deepcopy(run.opt.state_dict())
    for values in scattered["state"].values():
        values.update({key: torch.clone(t) for key, t in values.items()})
    run.opt.load_state_dict(scattered)
    _assert_one_range(_states(run))


@rules
@backends
@pytest.mark.parametrize("flatten", [True, "grads"])
def test_flattening_changes_no_bit_of_a_contiguous_model(rule, backend, flatten):
    forms = tuple(f for f in ALL if f.layout == "contiguous")
    plain, flat = (
        Run(VARIANTS[rule.name], forms, TYPES["f32"], backend, flatten=f) for f in (False, flatten)
    )
    for step in range(3):
        plain.step(step)
        for p, grad in zip(flat.params, flat.grads(step), strict=True):
            if step == 0:
                p.grad = grad
            else:
                p.grad.copy_(grad)
        flat.opt.param_groups[0].update(flat.variant.hyper)
        flat.opt.step()
        assert not differing(plain, flat)
        _assert_one_range(flat.params)
        if flatten == "grads":
            _assert_one_range([p.grad for p in flat.params])
            addresses = [p.grad.data_ptr() for p in flat.params]
            flat.opt.zero_grad()
            assert [p.grad.data_ptr() for p in flat.params] == addresses
            assert not any(p.grad.any() for p in flat.params)


@rules
@backends
def test_gradients_made_anew_are_flat_again_after_the_step(rule, backend):
    """As after model.zero_grad(), which knows nothing of the buffers."""
    form = tuple(f for f in ALL if f.layout == "contiguous")
    run = Run(VARIANTS[rule.name], form, TYPES["f32"], backend, flatten="grads")
    for step in range(3):
        for p, grad in zip(run.params, run.grads(step), strict=True):
            p.grad = grad.clone()
        run.opt.param_groups[0].update(run.variant.hyper)
        run.opt.step()
        _assert_one_range([p.grad for p in run.params])


@rules
def test_the_flat_buffers_are_the_parameters(rule):
    run = Run(VARIANTS[rule.name], ALL, TYPES["f32"], "cpu")
    before = [p.detach().clone() for p in run.params]
    strides = [torch.empty_like(p).stride() for p in run.params]
    (buffer,) = run.opt.flatten()
    assert all(torch.equal(p, b) for p, b in zip(run.params, before, strict=True))
    assert [p.stride() for p in run.params] == strides
    buffer.fill_(3)
    assert all((p == 3).all() for p in run.params)


def test_velocities_are_views_of_one_buffer():
    shapes = [form.shape for form in FORMS.values()]
    velocities = fused_momentum.initialize_velocities(shapes, dtype=torch.bfloat16)
    assert [tuple(v.shape) for v in velocities] == shapes
    assert {v.dtype for v in velocities} == {torch.bfloat16}
    assert len({v.untyped_storage().data_ptr() for v in velocities}) == 1
    assert not any(v.any() for v in velocities)
    _assert_one_range(velocities)
    for i, v in enumerate(velocities):
        v.fill_(i)
    assert all((v == i).all() for i, v in enumerate(velocities)), "they overlap"


def test_velocities_of_parameters_have_their_form():
    types = ("f32", "f64", "bf16", "c64")
    runs = [Run(VARIANTS["velocity"], ALL, TYPES[key], "reference") for key in types]
    params = [p for run in runs for p in run.params]
    velocities = fused_momentum.initialize_velocities_from_params(params)
    for p, v in zip(params, velocities, strict=True):
        assert (v.shape, v.dtype, v.device) == (p.shape, p.dtype, p.device)
        assert v.stride() == torch.empty_like(p).stride()
        assert not v.any()
    for key in types:
        mine = [v for v in velocities if v.dtype == TYPES[key].param]
        assert len({v.untyped_storage().data_ptr() for v in mine}) == 1
        _assert_one_range(mine)


@backends
def test_gradients_that_move_are_flat_again_and_parameters_stay(backend):
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizer = fused_momentum.FusedSGD(params, lr=0.1, flatten="grads", backend=backend)
    addresses = set()
    for fresh in (True, False, False, False, True):
        others = []
        for p in params if fresh else ():
            p.grad = torch.ones(5)
            others.append(torch.ones(100))  # so that the gradients do not lie side by side
        optimizer.step()
        begin, end = sorted(p.grad.data_ptr() for p in params)
        assert end - begin == ALIGNMENT
        addresses.add(tuple(p.data_ptr() for p in params))
    assert len(addresses) == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_gradient_that_returns_to_where_it_was_goes_back_into_the_buffer(backend):
    p, own = torch.nn.Parameter(torch.zeros(3)), torch.ones(3)
    optimizer = fused_momentum.FusedSGD([p], lr=1.0, momentum=0.5, flatten="grads", backend=backend)
    for _ in range(5):
        p.grad = own
        optimizer.step()
        assert p.grad.data_ptr() != own.data_ptr()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_parameter_that_returns_to_where_it_was_goes_back_into_the_buffer(backend):
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = fused_momentum.FusedSGD([p], lr=1.0, flatten=True, backend=backend)
    own = p.data
    for _ in range(3):
        p.data = own
        optimizer.step()
        assert p.data_ptr() != own.data_ptr()


@pytest.mark.parametrize("flatten", [True, "grads"])
def test_what_is_flat_stays_where_it_is_when_a_checkpoint_is_loaded(flatten):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = fused_momentum.FusedSGD(params, lr=0.1, momentum=0.9, flatten=flatten)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    (buffer,), addresses = optimizer.flatten(), [p.data_ptr() for p in params]
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    assert all((p.grad is not None) == (flatten == "grads") for p in params)
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert optimizer.flatten()[0] is buffer and [p.data_ptr() for p in params] == addresses

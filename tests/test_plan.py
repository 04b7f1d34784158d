"""The plan is cached between steps, and notices whatever changed in between."""

import gc
import math
import weakref

import pytest
import torch
from cases import (
    CLASSES,
    TYPES,
    VARIANTS,
    Run,
    bits,
    compiled,
    differing,
    one_thread,  # noqa: F401  a fixture for every test here
    rules,
)
from events import EVENTS, SOME, set_grads, start, train
from one_param import stepped, walks
from torch.nn import Parameter

from fused_momentum import FusedAutoSGM, FusedSGD, FusedSGDSaI, plan

# --- what is noticed between steps -----------------------------------------------------------


@compiled
def test_a_state_that_is_no_longer_needed_is_let_go(backend):
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    opt = FusedSGD([param], lr=0.1, momentum=0.9, backend=backend)
    opt.step()
    opt.step()
    buffer = weakref.ref(opt.state[param]["momentum_buffer"])
    opt.param_groups[0]["momentum"] = 0.0
    del opt.state[param]["momentum_buffer"]
    opt.step()
    assert buffer() is None


@rules
@compiled
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_optimizer_that_its_parameters_refer_to_is_collected(rule, backend, steps):
    run = start(VARIANTS[rule.name], backend)
    for param in run.params:
        param.optimizer = run.opt
    for step in range(steps):
        set_grads(run, step)
        run.opt.step()
    gone = [weakref.ref(x) for x in (run.opt, *run.params)]
    del run, param
    gc.collect()
    assert not [x for x in gone if x() is not None]


@rules
@compiled
def test_an_optimizer_is_let_go_at_once(rule, backend):
    run = start(VARIANTS[rule.name], backend)
    for step in range(2):
        set_grads(run, step)
        run.opt.step()
    gone = [weakref.ref(run.opt), weakref.ref(run.opt.state[run.params[1]][rule.states[0].name])]
    gc.disable()
    try:
        del run.opt
        assert not [x for x in gone if x() is not None]
    finally:
        gc.enable()


@rules
@compiled
def test_a_step_that_found_no_memory_for_its_states_can_be_taken_again(rule, backend, monkeypatch):
    def no_memory(*args):
        raise MemoryError

    runs = [start(VARIANTS[rule.name], name) for name in (backend, "reference")]
    for run in runs:
        set_grads(run, 0)
        for param in run.params:
            run.opt.state[param]["note"] = torch.ones(1)
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(plan, "make_states", no_memory)
            run.opt.step()
        run.opt.step()
    assert not differing(*runs)


@rules
@compiled
def test_a_state_that_cannot_be_made_is_an_error(rule, backend, monkeypatch):
    """Not a loop that makes it again and again."""
    run = start(VARIANTS[rule.name], backend)
    set_grads(run, 0)
    before = [bits(p) for p in run.params]
    monkeypatch.setattr(plan, "make_states", lambda *args: None)
    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\] lost its state while the step was"):
        run.opt.step()
    assert all(map(torch.equal, before, map(bits, run.params)))


@pytest.mark.parametrize("at", [(0,), (2,), (1, 2, 3)], ids=["first", "later", "repeated"])
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
@rules
@compiled
def test_the_plan_notices(rule, backend, event, at):
    variant = VARIANTS[rule.name]
    run, truth = (train(variant, name, event, at) for name in (backend, "reference"))
    assert not differing(run, truth)


@walks
def test_no_parameters_are_stepped_where_none_are_given(backend):
    p, optimizer = stepped(backend)
    before, version = bits(p), p._version
    buffer = optimizer.state[p]["momentum_buffer"].clone()
    optimizer.step_params([])
    assert torch.equal(bits(p), before) and p._version == version
    assert torch.equal(optimizer.state[p]["momentum_buffer"], buffer)


@walks
def test_a_group_without_parameters_is_an_error(backend):
    p, optimizer = stepped(backend)
    del optimizer.param_groups[0]["params"]
    before = bits(p)
    with pytest.raises(KeyError, match="params"):
        optimizer.step()
    assert torch.equal(bits(p), before)


@walks
def test_a_parameter_that_is_appended_to_its_group_takes_part(backend):
    _, optimizer = stepped(backend)
    other = Parameter(torch.ones(8))
    other.grad = torch.ones(8)
    optimizer.param_groups[0]["params"].append(other)
    optimizer.step()
    assert torch.equal(other, torch.full((8,), 0.9))


@walks
def test_a_state_that_is_handed_to_another_parameter(backend):
    """The dict and all that is in it stay; whose they are changes."""
    params = [Parameter(torch.ones(8)) for _ in range(2)]
    optimizer = FusedSGD(params, lr=1.0, momentum=0.5, backend=backend)
    params[0].grad = torch.ones(8)
    optimizer.step()
    optimizer.state[params[1]] = held = optimizer.state.pop(params[0])
    params[0].grad, params[1].grad = None, torch.zeros(8)
    optimizer.step()
    assert torch.equal(params[1], torch.full((8,), 0.5)) and torch.equal(params[0], torch.zeros(8))
    assert held["momentum_buffer"].tolist() == [0.5] * 8


@walks
def test_a_note_among_the_states_becomes_a_state(backend):
    """A key that is no parameter has its place taken by one that is."""
    first, second = (Parameter(torch.ones(8)) for _ in range(2))
    optimizer = FusedSGD([first, second], lr=1.0, momentum=0.5, backend=backend)
    second.grad = torch.ones(8)
    optimizer.step()
    optimizer.state["note"] = {}
    optimizer.step()
    del optimizer.state["note"]
    optimizer.state[first] = {"momentum_buffer": torch.full((8,), 2.0)}
    first.grad = torch.zeros(8)
    optimizer.step()
    assert torch.equal(first, torch.zeros(8)), "0.5 * 2 of its buffer"


@walks
@pytest.mark.parametrize(("cls", "key"), [(FusedSGDSaI, "gsnr"), (FusedAutoSGM, "step")])
def test_an_optimizer_that_its_numbers_refer_to_is_collected(cls, key, backend):
    p, optimizer = stepped(backend, cls=cls, steps=2)
    optimizer.state[p][key].owner = optimizer
    optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer, p
    gc.collect()
    assert gone() is None


@walks
def test_the_version_of_a_parameter_without_gradient_stays(backend):
    p, optimizer = stepped(backend)
    p.grad = None
    version = p._version
    optimizer.step()
    assert p._version == version


@walks
def test_states_that_were_made_in_inference_mode(backend):
    """They are as any others."""
    p, optimizer = stepped(backend, steps=0)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    twin, _ = stepped("reference", steps=2)
    assert torch.equal(p, twin)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
@walks
def test_parameters_that_were_made_in_inference_mode(cls, backend):
    """They count no versions, and torch writes them in that mode only."""
    with torch.inference_mode():
        p, optimizer = stepped(backend, cls=cls)
        optimizer.step()
    optimizer.step()
    twin, _ = stepped("reference", steps=3, cls=cls)
    assert torch.equal(p, twin) and p.is_inference()


@walks
def test_tensors_of_one_group_at_other_steps_have_numbers_of_their_own(backend):
    """All in one step, or one by one."""
    ended = []
    for one_by_one in (False, True):
        params = [Parameter(torch.linspace(-1, 1, 8)) for _ in range(3)]
        optimizer = FusedAutoSGM(params, lr=1e-1, backend=backend)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = None if i > step else torch.linspace(-1, 2, 8) * (step + 1)
            if one_by_one:
                for p in reversed(params):
                    optimizer.step_params([p])
            else:
                optimizer.step()
        ended.append([bits(p) for p in params])
    assert all(map(torch.equal, *ended))


# --- what takes part -------------------------------------------------------------------------


@rules
@compiled
def test_gradients_accumulate_in_place_between_steps(rule, backend):
    runs = [Run(VARIANTS[rule.name], SOME, TYPES["f32"], b).train() for b in (backend, "reference")]
    for run in runs:
        for p in run.params:
            p.grad.add_(p.detach())
        run.opt.step()
        run.opt.step()  # on the same gradients
    assert not differing(*runs)


@rules
@compiled
def test_only_the_given_parameters_are_stepped(rule, backend):
    whole, parts = (start(VARIANTS[rule.name], backend) for _ in range(2))
    for step in range(3):
        set_grads(whole, step)
        whole.opt.step()
        set_grads(parts, step)
        order = [parts.params[i] for i in (4, 0, 1, 5, 3, 2)]
        before = [bits(p) for p in order]
        versions = [p._version for p in order]
        parts.opt.step_params(p for p in order[:2])
        assert [p._version - v for p, v in zip(order, versions, strict=True)] == [1, 1, 0, 0, 0, 0]
        for p, old in zip(order[2:], before[2:], strict=True):
            assert torch.equal(bits(p), old)
        parts.opt.step_params(order[2])
        parts.opt.step_params(order[3:])
        assert [p._version - v for p, v in zip(order, versions, strict=True)] == [1] * 6
    assert not differing(whole, parts)


@compiled
def test_the_version_counter_is_that_of_the_tensor_that_the_parameter_is_by_now(backend):
    run = start(VARIANTS["sgd"], backend)
    set_grads(run, 0)
    run.opt.step()
    param = run.params[1]
    other = torch.nn.Parameter(param.detach().clone())
    other.grad = param.grad
    torch.utils.swap_tensors(param, other)
    versions = param._version, other._version
    run.opt.step()
    assert (param._version, other._version) == (versions[0] + 1, versions[1])


def test_a_walk_beside_another_is_not_alone():
    made = plan.Plan(FusedSGD.rule, "auto", None)
    for kind in ("xpu", "cpu"):
        made._take(kind, [])
    assert made._alone is None


def test_the_gradient_multiplier_is_a_float32():
    third = torch.tensor(1 / 3, dtype=torch.float32).item()
    assert plan.Amp(torch.tensor(3.0)).grad_multiplier() == third
    assert plan.Amp(torch.tensor(0.0)).grad_multiplier() == math.inf


def test_a_row_is_of_one_group_and_one_step():
    """Of FusedAutoSGM, in which a tensor's numbers depend on how many steps it has taken."""
    ended = []
    for backend in ("cpu", "reference"):
        params = [Parameter(torch.linspace(-1, 1, 8)) for _ in range(4)]
        groups = [{"params": params[:2], "lr": 1e-2}, {"params": params[2:], "lr": 1e-1}]
        optimizer = FusedAutoSGM(groups, backend=backend)
        for step in range(3):
            for i, p in enumerate(params):
                late = step == 1 and i == 3
                p.grad = None if late else torch.linspace(-1, 2, 8) * (step + 1)
            optimizer.step()
        ended.append([bits(p) for p in params])
    assert all(map(torch.equal, *ended))


@pytest.mark.parametrize("count", [math.nan, math.inf, -1.0])
@walks
def test_a_count_of_steps_that_is_none_is_an_error(backend, count):
    p, optimizer = stepped(backend, cls=FusedAutoSGM)
    optimizer.state[p]["step"].fill_(count)
    before = bits(p)
    with pytest.raises(ValueError, match=rf"\[0\]: its state 'step' is {count:g}; needed"):
        optimizer.step()
    assert torch.equal(bits(p), before)


BAD_STEPS = {"two": torch.ones(2), "double": torch.ones((), dtype=torch.float64), "int": 1}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("step", BAD_STEPS)
def test_a_step_that_cannot_be_counted_is_an_error(step, backend):
    p = Parameter(torch.ones(8))
    optimizer = FusedAutoSGM([p], lr=0.1, backend=backend)
    p.grad = torch.ones(8)
    optimizer.step()
    before = p.detach().clone()
    optimizer.state[p]["step"] = BAD_STEPS[step]
    with pytest.raises(TypeError, match=r"\[0\]: its state 'step' must be a torch.float32 tensor"):
        optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p]["step"] is BAD_STEPS[step]
    optimizer.state[p]["step"] = None  # is none
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 1.0

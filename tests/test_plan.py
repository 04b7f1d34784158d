"""The plan is cached between steps, and notices whatever changed in between."""

import weakref
from collections import defaultdict

import pytest
import torch
from cases import (
    EXTENSION,
    FORMS,
    LAYOUTS,
    TILE,
    TYPES,
    VARIANTS,
    Run,
    bits,
    compiled,
    differing,
    one_thread,  # noqa: F401  a fixture for every test here
    rules,
    values,
)
from torch.nn import Parameter

from fused_momentum import FusedSGD, plan

# --- what is noticed between steps -----------------------------------------------------------
# An event is done to an optimizer with a plan and to one on the reference, which walks afresh at
# every step. It returns the tensors that are no longer the optimizer's.

SOME = tuple(FORMS[name] for name in ("7", "1025", "4d", "channels_last", "transposed", "scalar"))
EVENTS = {}


def event(function):
    EVENTS[function.__name__] = function
    return function


def _state(run, i):
    return run.opt.state.get(run.params[i], {})


def _key(run):
    return run.variant.rule.states[0].name


@event
def nothing(run):
    return ()


@event
def grad_is_none(run):
    run.params[1].grad = None


@event
def grad_strides(run):
    run.params[4].grad = LAYOUTS["gaps"](run.params[4].grad)


@event
def grad_dtype(run):
    run.params[1].grad = run.params[1].grad.bfloat16()


@event
def data(run):
    old = run.params[1].data
    run.params[1].data = old * 2
    return [old]


@event
def data_strides(run):
    old = run.params[4].data
    run.params[4].data = old.clone(memory_format=torch.contiguous_format)
    return [old]


@event
def data_dtype(run):
    old = run.params[1].data
    run.params[1].data = old.to(torch.bfloat16, copy=True)
    return [old]


@event
def data_shape(run):
    old = run.params[1].data
    run.params[1].data = old.new_ones(3 * TILE)
    run.params[1].grad = old.new_ones(3 * TILE)
    for key in [s.name for s in run.variant.rule.states if s.name in _state(run, 1)]:
        _state(run, 1)[key] = old.new_ones(3 * TILE)
    return [old]


def _replace_state(run, i, change):
    old = _state(run, i).get(_key(run))
    if old is None:
        return []
    _state(run, i)[_key(run)] = change(old)
    return [old]


@event
def state(run):
    return _replace_state(run, 1, lambda old: old * 2)


@event
def state_dtype(run):
    return _replace_state(run, 1, lambda old: old.to(torch.bfloat16, copy=True))


@event
def state_strides(run):
    return _replace_state(run, 4, lambda old: old.contiguous() * 2)


@event
def state_data(run):
    buffer = _state(run, 1).get(_key(run))
    if buffer is None:
        return []
    old, buffer.data = buffer.data, buffer.data * 2
    return [old]


@event
def state_of_a_parameter(run):
    run.opt.state[run.params[1]] = {_key(run): torch.full_like(run.params[1], 0.3)}


@event
def state_made_long_ago(run):
    old = list(_state(run, 1).values())
    run.opt.state[run.params[1]] = run.spare.pop()
    return old


@event
def states_exchanged(run):
    run.opt.state, run.other_state = run.other_state, run.opt.state


@event
def state_before_a_subset_without_it(run):
    old = [*_replace_state(run, 1, lambda old: old * 2), *_replace_state(run, 2, lambda old: -old)]
    run.opt.step_params([run.params[2], run.params[4]])
    return old


@event
def state_deleted(run):
    old = list(run.opt.state.pop(run.params[1], {}).values())
    return old


@event
def state_emptied(run):
    old = list(_state(run, 1).values())
    _state(run, 1).clear()
    return old


@event
def all_states_cleared(run):
    old = [t for s in run.opt.state.values() for t in s.values()]
    run.opt.state.clear()
    return old


@event
def parameter(run):
    old = run.params[1]
    run.params[1] = run.opt.param_groups[0]["params"][1] = Parameter(torch.ones_like(old))
    run.params[1].grad = torch.ones_like(old)
    return [old]


@event
def parameter_list(run):
    group = run.opt.param_groups[0]
    group["params"] = list(reversed(group["params"]))


@event
def group(run):
    moved = run.opt.param_groups[0]["params"].pop()
    run.opt.add_param_group({"params": [moved], "lr": 0.5, "weight_decay": 0.3})


@event
def group_dict(run):
    run.opt.param_groups[0] = {**run.opt.param_groups[0], "lr": 0.5}


@event
def learning_rate_and_decay(run):
    run.opt.param_groups[0].update(lr=torch.tensor(0.02), weight_decay=0.5, maximize=True)


@event
def momentum(run):
    group = run.opt.param_groups[0]
    if "beta_cfg" in group:
        *poles, pole, _, gain, debias = group["beta_cfg"]
        group["beta_cfg"] = (*poles, 0.5 if pole == 0 else 0, 0, gain, debias)
    else:
        group["momentum"] = 0.5 if group["momentum"] == 0 else 0


@event
def number_of_the_step(run):
    if "step" in _state(run, 1):
        _state(run, 1)["step"].add_(2)  # in place


@event
def a_subset_first(run):
    run.opt.step_params(run.params[1:4])


@event
def a_subset_without_gradient(run):
    run.params[1].grad = None
    run.opt.step_params([run.params[2], run.params[1]])


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
def test_a_step_that_found_no_memory_for_its_states_can_be_taken_again(rule, backend, monkeypatch):
    def no_memory(*args):
        raise MemoryError

    runs = [_run(VARIANTS[rule.name], name) for name in (backend, "reference")]
    for run in runs:
        _set_grads(run, 0)
        for param in run.params:
            run.opt.state[param]["note"] = torch.ones(1)
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(plan, "make_states", no_memory)
            run.opt.step()
        run.opt.step()
    assert not differing(*runs)


def _run(variant, backend):
    run = Run(variant, SOME, TYPES["f32"], backend)
    run.opt.param_groups[0].update(variant.hyper)
    run.spare = [{_key(run): torch.full_like(run.params[1], 0.3)} for _ in range(3)]
    run.other_state = defaultdict(dict)
    return run


def _set_grads(run, step):
    for i, p in enumerate(run.params):
        p.grad_dtype = None
        p.grad = values(p.shape, p.dtype, 100 * step + i).to(p.device, copy=True)


def _train(variant, backend, event, at, fresh=True):
    run, abandoned = _run(variant, backend), []
    for step in range(5):
        if fresh or step == 0:
            _set_grads(run, step)
        if step in at:
            abandoned += [(t.detach(), t.detach().clone()) for t in event(run) or ()]
        run.opt.step()
    for tensor, then in abandoned:
        assert torch.equal(tensor, then), "written after it was replaced"
    return run


@pytest.mark.parametrize("at", [(0,), (2,), (1, 2, 3)], ids=["first", "later", "repeated"])
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
@rules
@compiled
def test_the_plan_notices(rule, backend, event, at):
    variant = VARIANTS[rule.name]
    run, truth = (_train(variant, name, event, at) for name in (backend, "reference"))
    assert not differing(run, truth)


# --- the number that stands for what a step works on -----------------------------------------


def _tables(walk):
    """Everything that the kernels' tables are made of, but for hyper-parameters."""
    names = ("addresses", "numels", "rows", "tensor_scalars", "kept", "layouts")
    tables = [[getattr(batch, name) for name in names] for batch in walk.batches()]
    return [[None if t is None else t.tolist() for t in batch] for batch in tables]


@pytest.fixture
def generations(monkeypatch):
    """The walk's number and its tables, at every step."""
    seen, run = [], plan._Walked.run

    def watched(self, walk, amp):
        if hasattr(walk, "generation"):  # the extension's
            seen.append((walk.generation, _tables(walk)))
        run(self, walk, amp)

    monkeypatch.setattr(plan._Walked, "run", watched)
    return seen


@pytest.mark.skipif(EXTENSION is None, reason="only the extension's walk has a number")
@pytest.mark.parametrize("fresh", [True, False], ids=["new-grads", "same-grads"])
@pytest.mark.parametrize("at", [(0,), (2,), (1, 2, 3)], ids=["first", "later", "repeated"])
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
@rules
def test_the_same_number_means_the_same_tables(rule, event, at, fresh, generations):
    """The launcher packs nothing anew while it stays: it must change with anything they hold."""
    _train(VARIANTS[rule.name], "cpu", event, at, fresh)
    tables_of = {}
    for generation, tables in generations:
        assert tables_of.setdefault(generation, tables) == tables


@pytest.mark.skipif(EXTENSION is None, reason="only the extension's walk has a number")
@rules
def test_the_number_stays_while_nothing_changes(rule, generations):
    run = _run(VARIANTS[rule.name], "cpu")
    _set_grads(run, 0)
    for step in range(6):
        run.opt.param_groups[0]["lr"] = 0.1 / (1 + step)
        run.opt.step()
    (first, _), *steady = generations
    assert len({number for number, _ in steady}) == 1
    run.opt.step_params(run.params[1:3])
    run.opt.step()
    numbers = [number for number, _ in generations]
    assert first < numbers[-3] < numbers[-2] < numbers[-1]


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
    whole, parts = (_run(VARIANTS[rule.name], backend) for _ in range(2))
    for step in range(3):
        _set_grads(whole, step)
        whole.opt.step()
        _set_grads(parts, step)
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

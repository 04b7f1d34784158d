"""The plan is cached between steps, and notices whatever changed in between."""

import gc
import math
import weakref

import pytest
import torch
from cases import (
    EXTENSION,
    TYPES,
    VARIANTS,
    Run,
    bits,
    compiled,
    differing,
    one_thread,  # noqa: F401  a fixture for every test here
    rules,
)
from events import EVENTS, SOME, assert_untouched, set_grads, start, with_copies
from torch.nn import Parameter

from fused_momentum import FusedAutoSGM, FusedSGD, plan

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


def _train(variant, backend, event, at, fresh=True):
    run, abandoned = start(variant, backend), []
    for step in range(5):
        if fresh or step == 0:
            set_grads(run, step)
        if step in at:
            abandoned += with_copies(event(run))
        run.opt.step()
    assert_untouched(abandoned)
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
    """The walk, its number and its tables, at every step."""
    seen, run = [], plan._Walked.run

    def watched(self, walk, amp):
        if hasattr(walk, "generation"):  # the extension's
            seen.append((walk, walk.generation, _tables(walk)))
        run(self, walk, amp)

    monkeypatch.setattr(plan._Walked, "run", watched)
    monkeypatch.setattr(plan.Plan, "_walk_alone", lambda self, name: None)  # it would not be seen
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
    for walk, generation, tables in generations:  # that of another walk is another number
        assert tables_of.setdefault((id(walk), generation), tables) == tables


@pytest.mark.skipif(EXTENSION is None, reason="only the extension's walk has a number")
@rules
def test_the_number_stays_while_nothing_changes(rule, generations):
    run = start(VARIANTS[rule.name], "cpu")
    set_grads(run, 0)
    for step in range(6):
        run.opt.param_groups[0]["lr"] = 0.1 / (1 + step)
        run.opt.step()
    (_, first, _), *steady = generations
    assert len({number for _, number, _ in steady}) == 1
    run.opt.step_params(run.params[1:3])
    run.opt.step()
    numbers = [number for _, number, _ in generations]
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

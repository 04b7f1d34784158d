"""The number that stands for what a step works on: the same number, the same tables."""

import pytest
import torch
from cases import (
    VARIANTS,
    one_thread,  # noqa: F401  a fixture for every test here
    rules,
)
from events import EVENTS, set_grads, start, train
from one_param import needs_extension, stepped

from fused_momentum import plan


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


@needs_extension
@pytest.mark.parametrize("fresh", [True, False], ids=["new-grads", "same-grads"])
@pytest.mark.parametrize("at", [(0,), (2,), (1, 2, 3)], ids=["first", "later", "repeated"])
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
@rules
def test_the_same_number_means_the_same_tables(rule, event, at, fresh, generations):
    """The launcher packs nothing anew while it stays: it must change with anything they hold."""
    train(VARIANTS[rule.name], "cpu", event, at, fresh)
    tables_of = {}
    for walk, generation, tables in generations:  # that of another walk is another number
        assert tables_of.setdefault((id(walk), generation), tables) == tables


@needs_extension
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


def _memory_order(p):
    p.data = p.data.t().clone(memory_format=torch.contiguous_format).t()


def _shorter_view(p):
    p.data, p.grad = p.data[:2], None
    p.grad = torch.ones(2, 4)


def _frozen(p):
    p.grad = None


@needs_extension
@pytest.mark.parametrize("change", [_memory_order, _shorter_view, _frozen])
def test_the_number_changes_with_what_it_stands_for(change):
    p, optimizer = stepped("cpu", (4, 4), steps=2, momentum=0.0)
    number = optimizer._plan.generation
    optimizer.step()
    assert optimizer._plan.generation == number
    change(p)
    optimizer.step()
    assert optimizer._plan.generation > number


@needs_extension
def test_a_parameter_of_another_shape_elsewhere_has_moved():
    p, optimizer = stepped("cpu", steps=2, momentum=0.0)
    moves = optimizer._plan.moves
    p.data, p.grad = torch.ones(5), None
    p.grad = torch.ones(5)
    optimizer.step()
    assert optimizer._plan.moves > moves

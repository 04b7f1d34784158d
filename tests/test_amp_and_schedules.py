"""Gradient scaling with overflows, and learning-rate schedulers."""

import copy
import pickle

import pytest
import torch
from loop import Net, assert_same, subjects, train, undisturbed
from torch.optim import lr_scheduler
from twin import HEAVY, STEPS, compare, param_floor, torch_sgd

from fused_momentum import FusedSGD

# --- mixed precision -------------------------------------------------------------------------


def _train_scaled(net, opt, unscale, overflow, steps=range(STEPS)):
    """Train with a GradScaler; the loss scale is a power of two, so that dividing is exact."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6)
    for step in steps:
        opt.zero_grad()
        scaler.scale(net()).backward()
        if step in overflow:
            net.filters.grad[1, 2, 3, 3] = torch.inf
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    return net


def _watch_gradients(net, opt):
    kept = []
    opt.register_step_pre_hook(lambda *_: kept.append([p.grad.clone() for p in net.parameters()]))

    def unchanged(*_):
        for p, grad in zip(net.parameters(), kept.pop(), strict=True):
            assert torch.equal(p.grad, grad)

    opt.register_step_post_hook(unchanged)


@subjects
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale"])
@pytest.mark.parametrize("overflow", [(), (0,), (0, 1), (3,), (0, 3, 5)], ids=str)
def test_overflowing_steps_are_as_if_never_taken(cls, kwargs, fused, unscale, overflow):
    net, plain = Net(), Net()
    opt = cls(net.parameters(), **kwargs, fused=fused)
    _watch_gradients(net, opt)
    _train_scaled(net, opt, unscale, overflow)
    train(plain, cls(plain.parameters(), **kwargs), range(STEPS - len(overflow)))
    assert_same(net, plain)


@subjects
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
def test_a_skipped_step_keeps_no_trace_of_the_momentum_it_would_have_used(cls, kwargs, fused):
    net, plain = Net(), Net()
    opt = cls(net.parameters(), **kwargs, fused=fused)
    other = cls(plain.parameters(), **kwargs)
    for step, momentum in enumerate([0.9, 0.5, 0.9, 0.7]):
        skipped = step == 1
        opt.param_groups[0]["momentum"] = momentum
        _train_scaled(net, opt, False, (1,) if skipped else (), [step])
        if not skipped:
            other.param_groups[0]["momentum"] = momentum
            train(plain, other, [step])
        assert_same(net, plain)


ROUTES = {"copied": copy.deepcopy, "pickled": lambda s: pickle.loads(pickle.dumps(s))}


@subjects
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_an_overflow_at_the_first_step_leaves_no_wrong_state_behind(cls, kwargs, route):
    net = Net()
    opt = cls(net.parameters(), **kwargs, fused=True)
    _train_scaled(net, opt, False, (0,), range(1))
    other = cls(net.parameters(), **kwargs)
    other.load_state_dict(route(opt.state_dict()))
    train(net, other)
    assert_same(net, undisturbed(cls, kwargs))


@subjects
def test_in_kernel_unscaling_is_on_request_and_survives_pickling(cls, kwargs):
    for fused in (None, True):
        opt = cls(Net().parameters(), **kwargs, fused=fused)
        for each in (opt, pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
            assert bool(getattr(each, "_step_supports_amp_scaling", False)) == bool(fused)


# --- schedulers ------------------------------------------------------------------------------


def _cycles(opt):
    """AutoSGM has no momentum to cycle: its schedulers must be told."""
    return {"cycle_momentum": "momentum" in opt.defaults}


SCHEDULERS = {
    "one_cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, STEPS + 1, **_cycles(opt)),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 2, **_cycles(opt)),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=STEPS),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.5**step),
}
schedules = pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
lr_kinds = pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float_lr", "tensor_lr"])


def _train_scheduled(net, opt, schedule):
    scheduler, written = schedule(opt), []
    for step in range(STEPS):
        group = opt.param_groups[0]
        written.append({key: float(group[key]) for key in ("lr", "momentum") if key in group})
        train(net, opt, [step])
        scheduler.step()
    return written


@subjects
@schedules
@lr_kinds
def test_a_schedule_equals_writing_the_group_by_hand(cls, kwargs, schedule, kind):
    net, other = Net(), Net()
    opt = cls(net.parameters(), **kwargs | {"lr": kind(kwargs["lr"])})
    written = _train_scheduled(net, opt, schedule)
    assert len({w["lr"] for w in written}) >= 3
    train(
        other,
        cls(other.parameters(), **kwargs),
        before=lambda _, opt, step: opt.param_groups[0].update(written[step]),
    )
    assert_same(net, other)


@schedules
@lr_kinds
def test_a_schedule_writes_and_trains_as_with_torch(schedule, kind):
    nets, written = [Net(), Net(), Net().double()], []
    for net, cls in zip(nets, (FusedSGD, torch_sgd, torch_sgd), strict=True):
        opt = cls(net.parameters(), **HEAVY | {"lr": kind(HEAVY["lr"])})
        written.append(_train_scheduled(net, opt, schedule))
    assert written[0] == written[1] == written[2]
    largest = 8.0  # of the values met: |p - 1| and its geometric sum
    floors = [param_floor(torch.float32, largest)] * 3
    compare(*(list(net.parameters()) for net in nets), floors)


@subjects
def test_a_hook_may_put_another_closure_in_the_place_of_ours(cls, kwargs):
    net = Net()
    opt = cls(net.parameters(), **kwargs)
    called = []

    def replace(opt, args, kwargs):
        return args, {**kwargs, "closure": lambda: called.append("the hook's")}

    opt.register_step_pre_hook(replace)
    opt.step(closure=lambda: called.append("ours"))
    assert called == ["the hook's"]


@subjects
def test_groups_may_be_a_tuple(cls, kwargs):
    net, plain = Net(), Net()
    opt = cls(net.parameters(), **kwargs)
    opt.param_groups = tuple(opt.param_groups)
    train(net, opt)
    train(plain, cls(plain.parameters(), **kwargs))
    assert_same(net, plain)

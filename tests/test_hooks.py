"""What hooks are given, how often they are called, and what a step in one of autograd's may do."""

import inspect

import pytest
import torch
from torch.nn import Linear, Parameter, Sequential, Tanh

from fused_momentum import FusedNAG, FusedSGD


def optimizer_of(cls):
    return cls([Parameter(torch.ones(1))], lr=0.1)


def test_hooks_are_called_once_where_a_class_overrides_the_step():
    class Mine(FusedSGD):
        def step(self, closure=None):
            return super().step(closure)

    optimizer, called = optimizer_of(Mine), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.step()
    assert called == ["before", "after"]


CALLS = {
    "nothing": ((), {}),
    "closure": ((lambda: 3.0,), {}),
    "keyword": ((), {"closure": lambda: 3.0}),
    "none": ((None,), {}),
}


@pytest.mark.parametrize(("args", "kwargs"), CALLS.values(), ids=CALLS)
def test_hooks_are_given_what_torch_gives_them(args, kwargs):
    seen = []
    for cls in (torch.optim.SGD, FusedSGD):
        optimizer = optimizer_of(cls)
        optimizer.register_step_pre_hook(lambda _, *given: seen.append(given))
        optimizer.register_step_post_hook(lambda _, *given: seen.append(given))
        optimizer.step(*args, **kwargs)
    seen = [(a[1:], k) for a, k in seen]  # a[0] is the optimizer
    assert seen[:2] == seen[2:]


@pytest.mark.parametrize("cls", [torch.optim.SGD, FusedSGD])
def test_a_hook_may_replace_the_closure(cls):
    optimizer = optimizer_of(cls)
    optimizer.register_step_pre_hook(lambda _, args, kwargs: ((args[0], lambda: 5.0), kwargs))
    assert optimizer.step(lambda: 3.0) == 5.0


def test_the_step_says_what_it_takes():
    assert [*inspect.signature(FusedSGD.step).parameters] == ["self", "closure"]
    with pytest.raises(TypeError):
        optimizer_of(FusedSGD).step(None, None)


def _train_by_hooks(optimizer_class, scheduler, **settings):
    torch.manual_seed(0)
    model = Sequential(Linear(4, 4), Tanh(), Linear(4, 4), Tanh(), Linear(4, 1))
    optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9)
    schedule = scheduler(optimizer, **settings)

    def update_now(param):
        optimizer.step_params(param)
        param.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update_now)
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        try:
            model(torch.ones(3, 4)).square().mean().backward()
        except RuntimeError:
            assert all(map(torch.equal, before, model.parameters())), "changed before the error"
            raise
        schedule.step()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_step_of_nag_does_not_move_what_the_backward_pass_reads():
    cycle = {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2}
    _train_by_hooks(FusedNAG, torch.optim.lr_scheduler.CyclicLR, **cycle, cycle_momentum=False)
    _train_by_hooks(FusedSGD, torch.optim.lr_scheduler.CyclicLR, **cycle)
    with pytest.raises(RuntimeError, match=r"momentum of param_groups\[0\] has changed from"):
        _train_by_hooks(FusedNAG, torch.optim.lr_scheduler.CyclicLR, **cycle)

"""The optimizers inside training loops: swapped tensors, closures, threads, compilers, wrappers.

Most checks say that something around the optimizer changes no bit of the result.
"""

import copy
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from loop import CLASSICAL, SUBJECTS, Net, assert_same, subjects, train, undisturbed
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel
from twin import HEAVY, STEPS, compare, param_floor, torch_sgd

from fused_momentum import FusedNAG, FusedSGD

# --- things that happen between steps --------------------------------------------------------


def _clone_data(net, opt, step):
    for p in net.parameters():
        p.data = p.data.clone()


def _change_strides(net, opt, step):
    net.to(memory_format=torch.channels_last if step % 2 else torch.contiguous_format)
    net.matrix.data = net.matrix.data.mT.contiguous().mT if step % 2 else net.matrix.data.clone()


def _evaluate_with_other_weights(net, opt, step):
    kept = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    net.load_state_dict(kept)


def _swap_in_new_parameters(net, opt, step):
    """As FSDP2 in Accelerate: an empty tensor in the group first, then another Parameter."""
    for name, old in list(net.named_parameters()):
        params = opt.param_groups[0]["params"]
        index = next(i for i, p in enumerate(params) if p is old)
        params[index] = torch.empty(0)
        params[index] = new = Parameter(old.detach().clone())
        setattr(net, name, new)
        if old in opt.state:
            opt.state[new] = opt.state.pop(old)


def _assign_and_rebuild(net, opt, step):
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    rebuilt = type(opt)(net.parameters(), lr=0.0)  # the loaded groups bring the rest
    rebuilt.load_state_dict(opt.state_dict())
    opt.__setstate__(rebuilt.__getstate__())


def _step_without_gradients(net, opt, step):
    net.zero_grad()  # not the optimizer's: with flatten="grads" that one leaves zeros
    opt.step()


BETWEEN = {
    "data_cloned": _clone_data,
    "strides_changed": _change_strides,
    "other_weights_for_evaluation": _evaluate_with_other_weights,
    "parameters_swapped": _swap_in_new_parameters,
    "assigned_and_rebuilt": _assign_and_rebuild,
    "gradients_kept": lambda net, opt, step: opt.zero_grad(set_to_none=False),
    "state_dict_reloaded": lambda net, opt, step: opt.load_state_dict(opt.state_dict()),
    "copied": lambda net, opt, step: copy.deepcopy((net, opt)),
    "step_without_gradients": _step_without_gradients,
}


@subjects
@pytest.mark.parametrize("flatten", [False, True, "grads"], ids=["plain", "flat", "flat_grads"])
@pytest.mark.parametrize("event", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("at", [(0,), (3,), tuple(range(STEPS))], ids=["first", "later", "always"])
def test_harmless_events_change_no_bit(cls, kwargs, flatten, event, at):
    net = Net()
    opt = cls(net.parameters(), **kwargs, flatten=flatten)
    train(net, opt, before=lambda *now: event(*now) if now[-1] in at else None)
    assert_same(net, undisturbed(cls, kwargs))


def _thaw(net, opt, step):
    net.scalar.requires_grad_(step >= 2)


def _join(net, opt, step):
    if step == 2:
        opt.add_param_group({"params": [net.scalar]})


@subjects
@pytest.mark.parametrize("flatten", [True, "grads"], ids=["flat", "flat_grads"])
@pytest.mark.parametrize("event", [_thaw, _join], ids=["thawed", "joined"])
def test_late_parameters_train_the_same_when_flat(cls, kwargs, flatten, event):
    nets = []
    for flat in (False, flatten):
        net = Net()
        early = [net.matrix, net.filters] + ([net.scalar] if event is _thaw else [])
        nets.append(train(net, cls(early, **kwargs, flatten=flat), before=event))
    assert_same(*nets)


@subjects
def test_replaced_parameters_are_not_written(cls, kwargs):
    net = Net()
    opt = cls(net.parameters(), **kwargs)
    train(net, opt, range(2))
    old = list(net.parameters())
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    new = copy.deepcopy(net)
    for p in old:
        p.grad = torch.ones_like(p)
    opt.step()
    assert_same(net, new)
    assert not any(torch.equal(p, q) for p, q in zip(old, new.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_converted_between_steps_trains_as_with_torch(dtype):
    nets = []
    for cls, first, last in [
        (FusedSGD, torch.float32, dtype),
        (torch_sgd, torch.float32, dtype),
        (torch_sgd, torch.float64, torch.float64),
    ]:
        net = Net().to(first)
        opt = cls(net.parameters(), **HEAVY)
        train(net, opt, range(3))
        train(net.to(last), opt, range(3, STEPS))
        assert {p.dtype for p in net.parameters()} == {last}
        nets.append(list(net.parameters()))
    # The coarser dtype of the two halves sets the precision; |p - 1| and its sums stay below 8.
    coarse = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    compare(*nets, [param_floor(coarse, 8.0)] * 3)


@subjects
def test_version_counters_move(cls, kwargs):
    net = Net()
    opt = cls(net.parameters(), **kwargs)
    net().backward()
    for _ in range(2):
        before = [p._version for p in net.parameters()]
        stale = net.matrix.square().sum()
        opt.step()
        assert all(p._version > v for p, v in zip(net.parameters(), before, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()


# --- closures, threads, compilers, wrappers --------------------------------------------------


@subjects
@pytest.mark.parametrize("outer", [True, False], ids=["grad_outside", "no_grad_outside"])
def test_the_closure_runs_once_with_grad_and_its_loss_returns(cls, kwargs, outer):
    net, modes = Net(), []
    opt = cls(net.parameters(), **kwargs)

    def closure():
        modes.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = net()
        loss.backward()
        modes.append(loss)
        return loss

    with torch.set_grad_enabled(outer):
        for step in range(STEPS):
            loss = opt.step(closure)
            assert len(modes) == 2 * step + 2
            assert modes[-2] is True
            assert modes[-1] is loss
            assert torch.is_grad_enabled() == outer
    assert_same(net, undisturbed(cls, kwargs))


@subjects
def test_two_optimizers_in_two_threads(cls, kwargs):
    steps, nets, start = range(200), [Net(), Net()], threading.Barrier(2)

    def work(net):
        opt = cls(net.parameters(), **kwargs)
        start.wait()
        train(net, opt, steps)

    threads = [threading.Thread(target=work, args=[net]) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = Net()
    train(alone, cls(alone.parameters(), **kwargs), steps)
    for net in nets:
        assert_same(net, alone)


# A scale by the largest of the model depends on which layers have been seen.
LAYERWISE = {name: row for name, row in SUBJECTS.items() if name != "sgd_sai_max"}


@pytest.mark.parametrize(("cls", "kwargs"), LAYERWISE.values(), ids=LAYERWISE)
def test_two_threads_that_step_layers_of_one_optimizer(cls, kwargs):
    """As backward hooks do on two devices: autograd has a thread for each."""
    steps, nets = range(200), [Net(), Net()]
    together = [p for net in nets for p in net.parameters()]
    opt, alone = cls(together, **kwargs), Net()

    def work(net):
        for _ in steps:
            for p in net.parameters():
                p.grad = p.detach() - 1
                opt.step_params([p])

    threads = [threading.Thread(target=work, args=[net]) for net in nets]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    train(alone, cls(alone.parameters(), **kwargs), steps)
    for net in nets:
        assert_same(net, alone)


def _compiled_loop(net, opt):
    def step():
        opt.zero_grad()
        net().backward()
        opt.step()

    step = torch.compile(step, backend="eager")
    for _ in range(STEPS):
        step()


def _compiled_step(net, opt):
    step = torch.compile(opt.step, backend="eager")
    for _ in range(STEPS):
        opt.zero_grad()
        net().backward()
        step()


@subjects
@pytest.mark.parametrize("loop", [_compiled_loop, _compiled_step], ids=["train_step", "opt_step"])
def test_torch_compile_changes_no_bit(cls, kwargs, loop):
    torch._dynamo.reset()  # graphs of other tests count against its recompile limit
    net = Net()
    loop(net, cls(net.parameters(), **kwargs))
    assert_same(net, undisturbed(cls, kwargs))


@subjects
def test_averaged_model(cls, kwargs):
    net = Net()
    opt, average, seen = cls(net.parameters(), **kwargs), AveragedModel(net), []
    for step in range(STEPS):
        train(net, opt, [step])
        average.update_parameters(net)
        seen.append(net.matrix.detach().clone().double())
    # n lerps of float32, each of three roundings of values below 8
    limit = 3 * STEPS * 8 * torch.finfo(torch.float32).eps / 2
    assert (average.module.matrix - torch.stack(seen).mean(0)).abs().max() <= limit
    assert_same(net, undisturbed(cls, kwargs))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@subjects
@pytest.mark.parametrize("bucket_view", [False, True], ids=["plain", "bucket_view"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of the import
@pytest.mark.usefixtures("one_process")
def test_zero_redundancy_optimizer(cls, kwargs, bucket_view):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = Net()
    opt = ZeroRedundancyOptimizer(
        net.parameters(), cls, parameters_as_bucket_view=bucket_view, **kwargs
    )
    train(net, opt)
    assert_same(net, undisturbed(cls, kwargs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_nag_moves_to_the_iterate_and_back_by_one_rounding_each(dtype, state_dtype):
    p = Parameter(torch.randn(1000).to(dtype))
    opt = FusedNAG([p], **CLASSICAL, state_dtype=state_dtype)
    for _ in range(3):
        p.grad = torch.randn(1000).to(dtype)
        opt.step()
    ahead, velocity = p.detach().float().clone(), opt.state[p]["velocity"].float()
    opt.eval()
    iterate = (ahead + velocity * -CLASSICAL["momentum"]).to(dtype)
    assert torch.equal(p, iterate)
    opt.train()
    assert torch.equal(p, (iterate.float() + velocity * CLASSICAL["momentum"]).to(dtype))


def nag_after_a_step():
    p = Parameter(torch.ones(3))
    optimizer = FusedNAG([p], lr=0.5, momentum=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.25
    return p, optimizer


def test_nag_without_a_gradient_looks_ahead_with_the_new_momentum():
    p, optimizer = nag_after_a_step()
    velocity, ahead = optimizer.state[p]["velocity"].clone(), p.detach().clone()
    p.grad = None
    optimizer.step()
    assert torch.equal(p, ahead - 0.25 * velocity)


def test_nag_stays_where_it_is_when_told_twice():
    p, optimizer = nag_after_a_step()
    for move in (optimizer.train, optimizer.eval):
        move()
        before, version = p.detach().clone(), p._version
        move()
        assert (p._version, optimizer.param_groups[0]["momentum"]) == (version, 0.25)
        assert torch.equal(p, before)

"""Memory that others drop, give back or share between steps and during one."""

import gc
import sys
import threading
import weakref

import pytest
import torch
from loop import CLASSICAL, Net, subjects, train
from one_param import needs_extension, stepped, walks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from fused_momentum import (
    FusedAutoSGM,
    FusedMomentum,
    FusedNAG,
    FusedSGD,
    FusedSGDSaI,
    gsnr,
    states,
)
from fused_momentum.plan import Plan, _Walked


def raise_memory_error(*_):
    raise MemoryError


# --- dropped --------------------------------------------------------------------------------------


@subjects
def test_states_are_gone_as_soon_as_they_are_dropped(cls, kwargs):
    """Whoever moves them to the host between steps wants their memory then."""
    net = Net()
    optimizer = cls(net.parameters(), **kwargs)
    train(net, optimizer)
    states = [weakref.ref(t) for s in optimizer.state.values() for t in s.values() if t.ndim]
    optimizer.state.clear()
    gc.collect()
    assert not [ref for ref in states if ref() is not None]


@subjects
def test_states_that_were_away_between_steps_change_nothing(cls, kwargs):
    nets = [Net(), Net()]
    optimizers = [cls(net.parameters(), **kwargs) for net in nets]
    for step in range(4):
        for net, optimizer in zip(nets, optimizers, strict=True):
            train(net, optimizer, [step])
        for values in optimizers[0].state.values():
            for name in list(values):
                away = values.pop(name).clone()
                values[name] = away.clone()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(p, q)


# --- given back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("what", ["param", "grad", "state"])
@walks
def test_memory_that_was_given_back_is_an_error(what, backend, offset):
    p, optimizer = stepped(backend)
    p.data, p.grad = torch.ones(8 + offset)[offset:], torch.ones(8 + offset)[offset:]
    buffer = torch.zeros(8 + offset)[offset:]
    optimizer.state[p]["momentum_buffer"] = buffer
    optimizer.step()
    named = {"param": p, "grad": p.grad, "state": buffer}
    before = {name: t.detach().clone() for name, t in named.items() if name != what}
    named[what].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\].* has no memory"):
        optimizer.step()
    assert all(torch.equal(named[name], t) for name, t in before.items())


def _of_the_optimizer(what, call, flatten=False):
    """A call that reads the second of two parameters, its gradient or its state."""

    def prepare():
        params = [Parameter(torch.ones(8)) for _ in range(2)]
        optimizer = FusedNAG(params, lr=0.1, momentum=0.9, flatten=flatten)
        for p in params:
            p.grad = torch.ones(8)
            optimizer.state[p] = {"velocity": torch.ones(8)}
        p = params[1]
        named = {"param": p, "grad": p.grad, "state": optimizer.state[p]["velocity"]}
        return named[what], lambda: call(optimizer), params

    return prepare


READ_BY = {
    "flatten": _of_the_optimizer("param", FusedNAG.flatten),
    "flatten_grads": _of_the_optimizer("grad", FusedNAG.flatten, "grads"),
    "eval": _of_the_optimizer("param", FusedNAG.eval),
    "eval_state": _of_the_optimizer("state", FusedNAG.eval),
    "gsnr": _of_the_optimizer("grad", lambda optimizer: gsnr(optimizer.param_groups[0]["params"])),
    "load": _of_the_optimizer("state", lambda o: o.load_state_dict(o.state_dict())),
}


@pytest.mark.parametrize("prepare", READ_BY.values(), ids=READ_BY)
def test_memory_that_was_given_back_is_not_read_elsewhere(prepare):
    tensor, call, params = prepare()
    before, addresses = params[0].detach().clone(), [p.data_ptr() for p in params]
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"1.* has no memory: its storage has been given back"):
        call()
    assert torch.equal(params[0], before) and params[0].data_ptr() == addresses[0]


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("view", [torch._neg_view, torch.conj], ids=["negated", "conjugated"])
@walks
def test_the_memory_of_a_lazy_gradient_that_was_given_back_is_an_error(view, backend, steps):
    """It would have to be read before the step is."""
    p = Parameter(torch.ones(8, dtype=torch.complex64))
    optimizer = FusedSGD([p], lr=0.1, backend=backend)
    p.grad = torch.ones(8, dtype=torch.complex64)
    for _ in range(steps):
        optimizer.step()
    p.grad = view(p.grad)
    p.grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\]\.grad has no memory"):
        optimizer.step()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("cls", "key"), [(FusedSGDSaI, "gsnr"), (FusedAutoSGM, "step")])
@walks
def test_the_memory_of_a_number_that_was_given_back_is_an_error(cls, key, backend, offset):
    p, optimizer = stepped(backend, cls=cls)
    number = optimizer.state[p][key] = torch.full((1 + offset,), 2.0)[offset:]
    optimizer.step()
    number.untyped_storage().resize_(0)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=rf"\[0\]: its state '{key}' has no memory"):
        optimizer.step()
    assert torch.equal(p, before)


@walks
def test_a_lazy_clone_of_a_count_of_steps_keeps_its_value(backend):
    p, optimizer = stepped(backend, cls=FusedAutoSGM)
    optimizer.state[p]["step"] = torch.ones(())
    clone = torch._lazy_clone(optimizer.state[p]["step"])
    optimizer.step()
    assert (optimizer.state[p]["step"].item(), clone.item()) == (2.0, 1.0)


# --- shared ---------------------------------------------------------------------------------------


@walks
def test_a_state_whose_elements_share_memory_is_an_error(backend):
    p, optimizer = stepped(backend)
    optimizer.state[p]["momentum_buffer"] = torch.zeros(1).expand(8)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\] state has elements that share"):
        optimizer.step()
    assert torch.equal(p, before)


@walks
def test_a_gradient_in_a_part_of_its_parameter_is_an_error(backend):
    buffer = torch.ones(101)
    p = Parameter(buffer[1:])
    p.grad = buffer[:-1]
    optimizer = FusedMomentum([p], **CLASSICAL, backend=backend)
    with pytest.raises(RuntimeError, match=r"\.grad shares a part of its parameter's memory"):
        optimizer.step()
    assert torch.equal(buffer, torch.ones(101))
    assert not optimizer.state


@walks
def test_a_gradient_that_comes_to_lie_in_its_parameter_is_an_error(backend):
    buffer = torch.ones(16)
    p = Parameter(buffer[:8])
    optimizer = FusedSGD([p], lr=0.5, backend=backend)
    p.grad = torch.ones(8)
    optimizer.step()
    p.grad = buffer[4:12]
    before = buffer.clone()
    with pytest.raises(RuntimeError, match=r"\.grad shares a part of its parameter's memory"):
        optimizer.step()
    assert torch.equal(buffer, before)


@walks
def test_a_gradient_may_lie_between_the_elements_of_its_parameter(backend):
    buffer = torch.ones(20)
    p = Parameter(buffer[::2])
    p.grad = buffer[1::2]
    FusedSGD([p], lr=0.5, backend=backend).step()
    assert buffer.tolist() == [0.5, 1.0] * 10


@walks
def test_an_expanded_gradient_is_read(backend):
    p = Parameter(torch.ones(4))
    p.grad = torch.ones(1).expand(4)
    FusedSGD([p], lr=0.5, backend=backend).step()
    assert p.tolist() == [0.5] * 4


@walks
def test_a_gradient_that_is_its_parameter_transposed_is_an_error(backend):
    p = Parameter(torch.arange(9.0).view(3, 3))
    p.grad = p.detach().t()
    with pytest.raises(RuntimeError, match="shares a part of its parameter's memory"):
        FusedSGD([p], lr=0.5, backend=backend).step()


@pytest.mark.parametrize("what", ["param", "state"])
@walks
def test_a_lazy_clone_keeps_its_values(backend, what):
    """Copied on write: it shares its memory until one of the two is written."""
    p, optimizer = stepped(backend)
    buffer = optimizer.state[p]["momentum_buffer"] = torch.ones(8)
    optimizer.step()
    clone = torch._lazy_clone({"param": p.detach(), "state": buffer}[what])
    before = clone.clone()
    for _ in range(2):
        optimizer.step()
    twin, _ = stepped("reference", steps=4)
    assert torch.equal(p, twin) and torch.equal(clone, before)


@needs_extension
def test_a_lazily_cloned_gradient_is_not_copied():
    p, optimizer = stepped("cpu")
    p.grad = torch._lazy_clone(torch.ones(8))
    optimizer.step()
    optimizer.step()
    assert torch._C._is_cow_tensor(p.grad)


@subjects
def test_a_gradient_that_is_its_parameter_is_none(cls, kwargs):
    tensors = []
    for aliased in (True, False):
        p = Parameter(torch.linspace(-1, 1, 100))
        p.grad = p.detach() if aliased else p.detach().clone()
        cls([p], **kwargs).step()
        tensors.append(p)
    assert torch.equal(*tensors)


# --- a step that fails ----------------------------------------------------------------------------


@walks
def test_what_has_not_begun_begins_with_the_next_attempt(backend, monkeypatch):
    """A step that raises leaves no state behind: the next one is the first."""
    monkeypatch.setattr(Plan, "_walk_alone", lambda self, name: None)
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = FusedSGD([p], lr=1.0, momentum=0.9, dampening=0.5, backend=backend)
    run, attempts = _Walked.run, []

    def fail_once(self, walk, amp):
        attempts.append(walk)
        if len(attempts) == 1:
            raise MemoryError
        run(self, walk, amp)

    monkeypatch.setattr(_Walked, "run", fail_once)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones(3)), "not dampened"


@walks
def test_a_buffer_that_is_given_after_a_failure_has_begun(backend, monkeypatch):
    monkeypatch.setattr(Plan, "_walk_alone", lambda self, name: None)
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = FusedSGD([p], lr=1.0, momentum=0.9, dampening=0.5, backend=backend)
    with monkeypatch.context() as context, pytest.raises(MemoryError):
        context.setattr(_Walked, "run", raise_memory_error)
        optimizer.step()
    optimizer.state[p]["momentum_buffer"] = torch.full((3,), 10.0)
    optimizer.step()
    assert torch.equal(p, torch.full((3,), -9.5)), "0.9 * 10 + 0.5 * 1"


@walks
def test_states_that_were_made_in_part_are_dropped(backend, monkeypatch):
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = FusedSGDSaI([p], lr=1.0, backend=backend)
    with monkeypatch.context() as context, pytest.raises(MemoryError):
        context.setattr(states, "_numbers", raise_memory_error)
        optimizer.step()
    assert not optimizer.state


@walks
def test_a_step_that_does_not_run_keeps_no_gradient(backend):
    p = Parameter(torch.zeros(3))
    optimizer = FusedSGDSaI([p], lr=1.0, backend=backend)
    p.grad = torch.ones(3)
    optimizer.initialise()
    grad = weakref.ref(p.grad)
    p.grad = None
    gc.collect()
    assert grad() is None


# --- while a step runs ---------------------------------------------------------------------------


@needs_extension
def test_what_a_step_works_on_is_held_until_it_has_run(monkeypatch):
    """Python runs between the walk and the step, and other threads with it."""
    monkeypatch.setattr(Plan, "_walk_alone", lambda self, name: None)
    p, optimizer = stepped("cpu")
    tensors = p, p.grad, optimizer.state[p]["momentum_buffer"]
    held = [StorageWeakRef(t.untyped_storage()) for t in tensors]
    del tensors
    run, gone = _Walked.run, []

    def drop_and_run(self, walk, amp):
        p.data, p.grad = torch.zeros(8), None
        optimizer.state.clear()
        gone.extend(ref.expired() for ref in held)
        run(self, walk, amp)

    monkeypatch.setattr(_Walked, "run", drop_and_run)
    optimizer.step()
    assert gone == [False] * 3 and all(ref.expired() for ref in held)


@needs_extension
def test_others_run_beside_a_large_step_and_may_drop_its_gradient(monkeypatch):
    p, optimizer = stepped("cpu", (1 << 24,))
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # only a step that lets others run does
    events, expected = [], p.detach().clone()
    try:
        for _ in range(20):  # a busy machine may not have run the other thread in time
            p.grad = torch.ones(1 << 24)
            grad, gate = StorageWeakRef(p.grad.untyped_storage()), threading.Event()

            def drop(grad=grad, gate=gate):
                gate.wait()
                p.grad = None
                events.append("gone" if grad.expired() else "dropped")

            events.clear()
            other = threading.Thread(target=drop)
            other.start()
            gate.set()
            optimizer.step()
            events.append("stepped")
            other.join()
            if events[0] != "stepped":
                break
    finally:
        sys.setswitchinterval(switch_interval)
    assert events == ["dropped", "stepped"]
    assert (p != expected).all() and p.unique().numel() == 1

"""Memory that others drop, give back, share or exchange between steps and during one."""

import gc
import weakref

import pytest
import torch
from cases import EXTENSION
from loop import CLASSICAL, Net, subjects, train
from torch.nn import Parameter

from fused_momentum import FusedMomentum, FusedSGD, FusedSGDSaI, states
from fused_momentum.plan import Plan, _Walked

needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the extension's walk alone")
backends = pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=needs_extension), "reference"]
)


def stepped(backend, shape=(8,), steps=1, **kwargs):
    """A parameter of ones and its optimizer, after some steps on gradients of ones."""
    p = Parameter(torch.ones(shape))
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9, backend=backend, **kwargs)
    p.grad = torch.ones(shape)
    for _ in range(steps):
        optimizer.step()
    return p, optimizer


def raise_memory_error(*_):
    raise MemoryError


# --- dropped -------------------------------------------------------------------------------------


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


# --- given back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("what", ["param", "grad", "state"])
@backends
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


# --- exchanged -----------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("shape", [(2, 3), (4, 3), (6, 4)], ids=str)
def test_a_state_that_was_resized_in_place_is_an_error(backend, shape):
    p, optimizer = stepped(backend, (4, 6))
    optimizer.state[p]["momentum_buffer"].resize_(shape)
    if shape == (6, 4):  # as many elements: seen where the dict changes too
        optimizer.state[p]["note"] = 0
    with pytest.raises(ValueError, match=r"state has shape \["):
        optimizer.step()


@backends
def test_a_state_that_comes_back_in_another_memory_order(backend):
    """By chance at the same address, as another object at the address of the last one."""
    p, optimizer = stepped(backend, (2, 3, 4, 4))
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    p.grad = torch.randn(2, 3, 4, 4)
    twin = Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    other = FusedSGD([twin], lr=0.1, momentum=0.9, backend="reference")
    other.state[twin]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].clone()
    host = torch.empty(2, 3, 4, 4)
    for step in range(8):
        values = optimizer.state[p]
        host.copy_(values["momentum_buffer"])
        del values["momentum_buffer"]
        order = torch.channels_last if step % 2 else torch.contiguous_format
        values["momentum_buffer"] = host.clone(memory_format=order)
        p.grad = torch.randn(2, 3, 4, 4)
        twin.grad = p.grad.clone()
        optimizer.step()
        other.step()
    assert torch.equal(p, twin)


@backends
def test_what_takes_the_place_of_a_state_need_not_be_a_tensor(backend):
    class Chunks(list):
        pass

    p, optimizer = stepped(backend)
    values = optimizer.state[p]
    for _ in range(50):
        optimizer.step()
        del values["momentum_buffer"]
        values["momentum_buffer"] = Chunks()
        optimizer.step()
        assert isinstance(values["momentum_buffer"], torch.Tensor), "made anew: it was none"


@backends
def test_a_state_of_another_dtype_at_the_same_address_is_noticed(backend):
    p, optimizer = stepped(backend)
    buffer = optimizer.state[p]["momentum_buffer"]
    other = torch.empty(0, dtype=torch.bfloat16).set_(buffer.untyped_storage(), 0, (8,))
    other.zero_()
    optimizer.state[p]["momentum_buffer"] = other
    optimizer.step()
    assert torch.equal(other, torch.ones(8, dtype=torch.bfloat16))


# --- shared --------------------------------------------------------------------------------------


@backends
def test_a_state_whose_elements_share_memory_is_an_error(backend):
    p, optimizer = stepped(backend)
    optimizer.state[p]["momentum_buffer"] = torch.zeros(1).expand(8)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\] state has elements that share"):
        optimizer.step()
    assert torch.equal(p, before)


@backends
def test_a_gradient_in_a_part_of_its_parameter_is_an_error(backend):
    buffer = torch.ones(101)
    p = Parameter(buffer[1:])
    p.grad = buffer[:-1]
    optimizer = FusedMomentum([p], **CLASSICAL, backend=backend)
    with pytest.raises(RuntimeError, match=r"\.grad shares a part of its parameter's memory"):
        optimizer.step()
    assert torch.equal(buffer, torch.ones(101))
    assert not optimizer.state


@backends
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


@backends
def test_a_gradient_may_lie_between_the_elements_of_its_parameter(backend):
    buffer = torch.ones(20)
    p = Parameter(buffer[::2])
    p.grad = buffer[1::2]
    FusedSGD([p], lr=0.5, backend=backend).step()
    assert buffer.tolist() == [0.5, 1.0] * 10


@backends
def test_an_expanded_gradient_is_read(backend):
    p = Parameter(torch.ones(4))
    p.grad = torch.ones(1).expand(4)
    FusedSGD([p], lr=0.5, backend=backend).step()
    assert p.tolist() == [0.5] * 4


@backends
def test_a_gradient_that_is_its_parameter_transposed_is_an_error(backend):
    p = Parameter(torch.arange(9.0).view(3, 3))
    p.grad = p.detach().t()
    with pytest.raises(RuntimeError, match="shares a part of its parameter's memory"):
        FusedSGD([p], lr=0.5, backend=backend).step()


@pytest.mark.parametrize("what", ["param", "state"])
@backends
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


@pytest.mark.skipif(EXTENSION is None, reason="the reference asks for addresses in Python")
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


# --- exchanged -----------------------------------------------------------------------------------


@backends
def test_a_parameter_that_is_larger_by_now_is_updated_whole(backend):
    p = Parameter(torch.ones(8))
    optimizer = FusedSGD([p], lr=0.5, backend=backend)  # without states, whose sizes would tell
    for size in (8, 12, 4):
        p.data, p.grad = torch.ones(size), None
        p.grad = torch.ones(size)
        optimizer.step()
        assert p.tolist() == [0.5] * size


@backends
def test_a_gradient_that_is_lazily_conjugated_by_now_is_read_as_it_is(backend):
    p = Parameter(torch.zeros(8, dtype=torch.complex64))
    optimizer = FusedSGD([p], lr=1.0, backend=backend)
    p.grad = torch.full((8,), 1j)
    optimizer.step()
    p.grad = p.grad.conj()  # the same memory
    optimizer.step()
    assert p.tolist() == [0j] * 8


@backends
def test_a_parameter_that_is_lazily_conjugated_by_now_is_an_error(backend):
    p = Parameter(torch.zeros(8, dtype=torch.complex64))
    optimizer = FusedSGD([p], lr=1.0, backend=backend)
    p.grad = torch.full((8,), 1j)
    optimizer.step()
    p.data = p.data.conj()
    with pytest.raises(TypeError, match="lazily conjugated"):
        optimizer.step()


# --- a step that fails ---------------------------------------------------------------------------


@backends
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


@backends
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


@backends
def test_states_that_were_made_in_part_are_dropped(backend, monkeypatch):
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = FusedSGDSaI([p], lr=1.0, backend=backend)
    with monkeypatch.context() as context, pytest.raises(MemoryError):
        context.setattr(states, "_numbers", raise_memory_error)
        optimizer.step()
    assert not optimizer.state


@backends
def test_a_step_that_does_not_run_keeps_no_gradient(backend):
    p = Parameter(torch.zeros(3))
    optimizer = FusedSGDSaI([p], lr=1.0, backend=backend)
    p.grad = torch.ones(3)
    optimizer.initialise()
    grad = weakref.ref(p.grad)
    p.grad = None
    gc.collect()
    assert grad() is None

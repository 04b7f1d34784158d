"""What is another tensor, or is read otherwise, than at the step before."""

import pytest
import torch
from one_param import needs_extension, stepped, walks
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from fused_momentum import FusedAutoSGM, FusedSGD, FusedSGDSaI


@walks
@pytest.mark.parametrize("shape", [(2, 3), (4, 3), (6, 4)], ids=str)
def test_a_state_that_was_resized_in_place_is_an_error(backend, shape):
    p, optimizer = stepped(backend, (4, 6))
    optimizer.state[p]["momentum_buffer"].resize_(shape)
    if shape == (6, 4):  # as many elements: seen where the dict changes too
        optimizer.state[p]["note"] = 0
    with pytest.raises(ValueError, match=r"state has shape \["):
        optimizer.step()


@walks
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


@walks
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


@walks
def test_a_state_of_another_dtype_at_the_same_address_is_noticed(backend):
    p, optimizer = stepped(backend)
    buffer = optimizer.state[p]["momentum_buffer"]
    other = torch.empty(0, dtype=torch.bfloat16).set_(buffer.untyped_storage(), 0, (8,))
    other.zero_()
    optimizer.state[p]["momentum_buffer"] = other
    optimizer.step()
    assert torch.equal(other, torch.ones(8, dtype=torch.bfloat16))


@walks
def test_a_parameter_that_is_larger_by_now_is_updated_whole(backend):
    p = Parameter(torch.ones(8))
    optimizer = FusedSGD([p], lr=0.5, backend=backend)  # without states, whose sizes would tell
    for size in (8, 12, 4):
        p.data, p.grad = torch.ones(size), None
        p.grad = torch.ones(size)
        optimizer.step()
        assert p.tolist() == [0.5] * size


@walks
def test_a_gradient_that_is_lazily_conjugated_by_now_is_read_as_it_is(backend):
    p = Parameter(torch.zeros(8, dtype=torch.complex64))
    optimizer = FusedSGD([p], lr=1.0, backend=backend)
    p.grad = torch.full((8,), 1j)
    optimizer.step()
    p.grad = p.grad.conj()  # the same memory
    optimizer.step()
    assert p.tolist() == [0j] * 8


@walks
def test_a_parameter_that_is_lazily_conjugated_by_now_is_an_error(backend):
    p = Parameter(torch.zeros(8, dtype=torch.complex64))
    optimizer = FusedSGD([p], lr=1.0, backend=backend)
    p.grad = torch.full((8,), 1j)
    optimizer.step()
    p.data = p.data.conj()
    with pytest.raises(TypeError, match="lazily conjugated"):
        optimizer.step()


@walks
def test_a_gradient_that_is_lazily_negated_by_now_is_read_as_it_is(backend):
    p, optimizer = stepped(backend, momentum=0.0)
    p.grad = torch._neg_view(p.grad)  # the same memory
    optimizer.step()
    assert torch.equal(p, torch.full((8,), 0.9).add(0.1)), "down, and up again"


@walks
def test_a_parameter_that_is_lazily_negated_by_now_is_an_error(backend):
    p, optimizer = stepped(backend)
    p.data = torch._neg_view(p.data)
    with pytest.raises(TypeError, match="lazily conjugated or negated"):
        optimizer.step()


RESIZED = {
    "split": ((12,), (4, 3)),
    "another_dimension": ((12,), (12, 1)),
    "merged": ((4, 3), (12,)),
    "transposed": ((4, 3), (3, 4)),
}


@walks
@pytest.mark.parametrize(("shape", "other"), RESIZED.values(), ids=RESIZED)
def test_a_gradient_that_was_resized_in_place_is_an_error(backend, shape, other):
    p, optimizer = stepped(backend, shape)
    p.grad.resize_(other)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"\['params'\]\[0\]\.grad has shape"):
        optimizer.step()
    assert torch.equal(p, before)


@walks
def test_a_gradient_that_is_no_longer_transposed_is_an_error(backend):
    """As much memory as before, and the same sizes in the other order."""
    p = Parameter(torch.ones(4, 3).t())
    optimizer = FusedSGD([p], lr=0.1, backend=backend)
    p.grad = torch.ones(4, 3).t()
    optimizer.step()
    p.grad.resize_((4, 3))
    with pytest.raises(ValueError, match=r"\.grad has shape \[4, 3\], its parameter \[3, 4\]"):
        optimizer.step()


@needs_extension
def test_a_gradient_of_too_many_dimensions_in_another_order_is_an_error():
    shape = (2,) * 9
    p, optimizer = stepped("cpu", shape)
    p.grad = torch.ones(shape).permute(*reversed(range(9)))
    with pytest.raises(RuntimeError, match=r"with its gradient has more than 8 dimensions"):
        optimizer.step()


@walks
def test_a_subclass_without_storage_is_an_error(backend):
    p = Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    optimizer = FusedSGD([p], lr=0.1, backend=backend)
    p.grad = torch.ones(3)
    with pytest.raises(TypeError, match=r"\[0\] is a tensor subclass without storage of its own"):
        optimizer.step()


@walks
def test_a_gradient_of_a_bad_kind_and_then_none(backend):
    p, optimizer = stepped(backend)
    p.grad_dtype = None
    p.grad = torch.ones(8, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"\.grad has dtype torch.int32"):
        optimizer.step()
    before, version = p.detach().clone(), p._version
    p.grad = None
    optimizer.step()
    assert torch.equal(p, before) and p._version == version


# --- states and numbers --------------------------------------------------------------------------


@walks
def test_a_sparse_state_is_an_error(backend):
    p, optimizer = stepped(backend)
    optimizer.state[p]["momentum_buffer"] = torch.ones(8).to_sparse()
    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\] state is sparse"):
        optimizer.step()


@walks
def test_a_state_that_is_not_needed_may_be_anything(backend):
    p, optimizer = stepped(backend, momentum=0.0)
    optimizer.state[p]["momentum_buffer"] = buffer = torch.ones(5)
    optimizer.step()
    assert p.tolist() == pytest.approx([0.8] * 8) and buffer.tolist() == [1.0] * 5


@walks
def test_a_state_that_was_transposed_in_place(backend):
    p, optimizer = stepped(backend, (4, 4))
    table = torch.arange(16.0).view(4, 4)
    buffer = optimizer.state[p]["momentum_buffer"].copy_(table)
    buffer.t_()
    p.grad.copy_(table)
    optimizer.state[p]["note"] = 0  # seen where the dict changes too
    optimizer.step()
    assert torch.equal(buffer, 0.9 * table.t() + table)


BAD_NUMBERS = {
    "of_two": torch.ones(2),
    "of_half": torch.ones((), dtype=torch.float16),
    "on_meta": torch.ones((), device="meta"),
}


@walks
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("number", BAD_NUMBERS.values(), ids=BAD_NUMBERS)
def test_a_number_that_cannot_be_kept_is_an_error(backend, steps, number):
    p, optimizer = stepped(backend, steps=steps, cls=FusedSGDSaI)
    optimizer.state[p]["gsnr"] = number
    before = p.detach().clone()
    with pytest.raises(
        TypeError, match=r"\[0\]: its state 'gsnr' must be a torch.float32 tensor of"
    ):
        optimizer.step()
    assert torch.equal(p, before)


@walks
def test_a_number_that_takes_the_place_of_another_is_used(backend):
    p = Parameter(torch.ones(8))
    optimizer = FusedSGDSaI([p], lr=0.1, weight_decay=0.0, backend=backend)
    p.grad = torch.linspace(1, 2, 8)
    optimizer.step()
    before = p.detach().clone()
    optimizer.state[p]["gsnr"] = torch.zeros(1)
    optimizer.step()
    assert torch.equal(p, before)


@walks
def test_a_count_of_steps_that_is_gone_begins_anew(backend):
    p, optimizer = stepped(backend, steps=3, cls=FusedAutoSGM)
    assert optimizer.state[p]["step"].item() == 3
    del optimizer.state[p]["step"]
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 1


@walks
def test_a_number_beyond_every_float_is_an_error(backend):
    p, optimizer = stepped(backend)
    optimizer.param_groups[0]["lr"] = 10**400
    before = p.detach().clone()
    with pytest.raises(OverflowError):
        optimizer.step()
    assert torch.equal(p, before)

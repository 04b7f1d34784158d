"""What tensors of a functional op may share, and which overlaps are errors."""

import pytest
import torch

from fused_momentum import ops
from fused_momentum.backends import Choice


def test_a_gradient_may_be_its_parameter():
    p, q = torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 9)
    ops.sgd_([p], [p], lr=0.5)
    ops.sgd_([q], [q.clone()], lr=0.5)
    assert torch.equal(p, q)


def test_one_gradient_may_serve_two_parameters():
    params, grad = [torch.ones(9), torch.ones(9)], torch.ones(9)
    ops.sgd_(params, [grad, grad], lr=0.5)
    assert all(torch.equal(p, torch.full((9,), 0.5)) for p in params)


def test_tensors_without_elements_overlap_with_nothing():
    flat = torch.ones(9)
    ops.sgd_([flat, flat[5:5]], [torch.ones(9), torch.ones(0)], lr=0.5)
    assert torch.equal(flat, torch.full((9,), 0.5))
    params, grads = ([torch.ones(3, 0), torch.ones(3, 0)] for _ in range(2))
    ops.sgd_(params, grads, lr=0.5)


def test_an_overlap_is_found_behind_a_smaller_one():
    flat = torch.ones(100)
    params = [torch.ones(100), torch.ones(10), flat[50:60]]
    grads = [flat, flat[10:20], torch.ones(10)]
    with pytest.raises(ValueError, match=r"grads\[0\] and params\[2\] overlap"):
        ops.sgd_(params, grads, lr=0.5)


def test_an_overlap_is_found_in_gaps():
    flat = torch.ones(20)
    params = [flat[::2], flat[15:]]
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] overlap"):
        ops.sgd_(params, [torch.ones(10), torch.ones(5)], lr=0.5)


@pytest.mark.parametrize("op", [ops.sgd, ops.sgd_], ids=["functional", "in_place"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", ["params", "grads", "momentum_buffers"])
def test_memory_that_was_given_back_is_an_error(name, offset, backend, op, monkeypatch):
    monkeypatch.setattr(ops, "choose", lambda *asked: Choice(backend, "for this test"))
    names = ["params", "grads", "momentum_buffers"]
    lists = {key: [torch.ones(3), torch.ones(3 + offset)[offset:]] for key in names}
    lists[name][1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"{name}\[1\] has no memory: its storage"):
        op(**lists, lr=0.1, momentum=0.9)
    assert all(torch.equal(tensors[0], torch.ones(3)) for tensors in lists.values())

"""Checkpoints that lack something, or have it in another form, and copies of an optimizer."""

import copy
import pickle

import pytest
import torch
from torch.nn import Parameter

from fused_momentum import FusedMomentum, FusedNAG, FusedSGD, FusedSGDSaI


def stepped(cls=FusedSGD, **kwargs):
    p = Parameter(torch.ones(8))
    p.grad = torch.full((8,), 0.3)
    optimizer = cls([p], lr=0.1, momentum=0.9, **kwargs)
    optimizer.step()
    return p, optimizer


def holding(optimizer, **states):
    """A state_dict of the optimizer's groups, in which its only parameter has these states."""
    return {"state": {0: states}, "param_groups": optimizer.state_dict()["param_groups"]}


def test_a_key_that_a_checkpoint_does_not_have_is_false():
    """One of torch.optim.SGD has no decoupled decay, whatever the optimizer was made with."""
    saved = torch.optim.SGD([Parameter(torch.ones(8))], lr=0.1, momentum=0.9).state_dict()
    _, optimizer = stepped(decoupled_weight_decay=True)
    optimizer.load_state_dict(saved)
    assert not optimizer.param_groups[0].get("decoupled_weight_decay")


def test_a_checkpoint_without_the_look_ahead():
    _, saved = stepped(FusedMomentum)
    _, optimizer = stepped(FusedNAG)
    optimizer.load_state_dict(saved.state_dict())
    optimizer.step()
    assert optimizer.param_groups[0]["lookahead_momentum"] == 0.9


def test_numbers_of_one_element_are_loaded():
    p, optimizer = stepped(FusedSGDSaI)
    optimizer.load_state_dict(
        holding(optimizer, momentum_buffer=torch.ones(8), gsnr=torch.full((1,), 3.0))
    )
    assert torch.equal(optimizer.state[p]["gsnr"], torch.tensor(3.0))


def test_a_tensor_of_one_element_is_no_buffer():
    _, optimizer = stepped()
    with pytest.raises(ValueError, match=r"parameter 0 has shape \[1\]; needed: \[8\]"):
        optimizer.load_state_dict(holding(optimizer, momentum_buffer=torch.ones(1)))


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_keeps_the_type_of_states(way):
    _, optimizer = stepped(state_dtype=torch.float64)
    (values,) = way(optimizer).state.values()
    assert values["momentum_buffer"].dtype == torch.float64


def test_a_shallow_copy_has_states_of_its_own():
    p, optimizer = stepped()
    before = optimizer.state[p]["momentum_buffer"]
    copied = copy.copy(optimizer)
    assert optimizer.state[p]["momentum_buffer"] is before
    assert copied.state[p]["momentum_buffer"] is not before

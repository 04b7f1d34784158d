"""Checkpoints that lack something, or have it in another form, and copies of an optimizer."""

import copy
import pickle

import pytest
import torch
from torch.nn import Parameter

from fused_momentum import FusedAutoSGM, FusedMomentum, FusedNAG, FusedSGD, FusedSGDSaI


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


# --- what is refused -----------------------------------------------------------------------------


def test_a_count_of_steps_alone_is_another_optimizers():
    p = Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    adam = torch.optim.AdamW([p])
    adam.step()
    optimizer = FusedAutoSGM([p], lr=0.1)
    with pytest.raises(ValueError, match=r"parameter 0 has \['exp_avg', 'exp_avg_sq', 'step'\]"):
        optimizer.load_state_dict(adam.state_dict())
    assert not optimizer.state and "betas" not in optimizer.param_groups[0]
    optimizer.step()
    steps = {0: {"step": torch.tensor(3.0)}}  # of settings that need nothing else
    optimizer.load_state_dict(optimizer.state_dict() | {"state": steps})
    assert optimizer.state[p]["step"] == 3.0
    with pytest.raises(ValueError, match=r"parameter 0 has \['step'\]"):
        FusedSGD([p], lr=0.1, momentum=0.9).load_state_dict(
            torch.optim.SGD([p], momentum=0.9).state_dict() | {"state": steps}
        )


IGNORED = {
    "nesterov": (FusedMomentum, {"nesterov": True}, ValueError, "no nesterov switch"),
    "nag": (FusedNAG, {"nesterov": True}, ValueError, "no nesterov switch"),
    "dampening": (FusedSGDSaI, {"dampening": 0.5}, ValueError, "has no dampening"),
    "differentiable": (FusedSGD, {"differentiable": True}, RuntimeError, "is not supported"),
}


@pytest.mark.parametrize(("cls", "setting", "error", "message"), IGNORED.values(), ids=IGNORED)
def test_a_setting_that_would_have_no_effect_is_refused(cls, setting, error, message):
    params = [Parameter(torch.ones(8))]
    saved = torch.optim.SGD(params, lr=0.5, momentum=0.9, **setting).state_dict()
    optimizer = cls(params, lr=0.1)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_complex_states_of_a_real_parameter_are_refused():
    _, optimizer = stepped()
    saved = holding(optimizer, momentum_buffer=torch.ones(8, dtype=torch.complex64))
    with pytest.raises(TypeError, match="momentum_buffer of parameter 0 is complex"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("loaded", [False, True], ids=["deleted", "loaded"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_scale_that_is_lacking_is_measured_anew(backend, loaded):
    p, optimizer = stepped(FusedSGDSaI, backend=backend)
    scale = optimizer.state[p]["gsnr"].clone()
    if loaded:
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["state"][0]["gsnr"]
        optimizer.load_state_dict(saved)
    else:
        del optimizer.state[p]["gsnr"]
    optimizer.step()
    assert torch.equal(optimizer.state[p]["gsnr"], scale) and optimizer.state[p]["stage"] == 3

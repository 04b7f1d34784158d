"""A default device (torch.set_default_device) is for the user's tensors: ours are told theirs."""

import copy

import pytest
import torch
from cases import CLASSES, accepted, backends, device_of
from torch.nn import Parameter

from fused_momentum import FusedSGDSaI, gsnr, ops


def _trained(cls, backend, flatten, default):
    device = device_of(backend)
    params = [Parameter(torch.ones(size, device=device)) for size in ((5,), (2, 3), ())]
    more = accepted(cls, momentum=0.9)
    optimizer = cls(params, lr=0.1, backend=backend, flatten=flatten, **more)
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 0.5 + i)
    with torch.device(default):
        if hasattr(optimizer, "initialise"):
            optimizer.initialise()
        optimizer.step()
        optimizer.step_params(params[:2])
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        optimizer.flatten()
        optimizer.step()
    states = [optimizer.state[p] for p in params]
    return params + [t for s in states for t in s.values() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("flatten", [False, True, "grads"])
@backends
@pytest.mark.parametrize("cls", CLASSES.values(), ids=lambda cls: cls.__name__)
def test_training_is_the_same(cls, backend, flatten):
    tensors, others = (_trained(cls, backend, flatten, default) for default in ("meta", "cpu"))
    assert len(tensors) == len(others) > 3
    for t, other in zip(tensors, others, strict=True):
        assert t.device == other.device and torch.equal(t, other)


def test_functions_are_the_same():
    p, g, m = ([torch.full((3,), value)] for value in (1.0, 0.5, 0.0))
    with torch.device("meta"):
        ops.sgd_(p, g, m, lr=0.1, momentum=0.5)
    assert torch.equal(p[0], torch.full((3,), 1.0) - torch.tensor(0.1) * 0.5)


def test_what_is_measured_is_the_same():
    p = Parameter(torch.ones(4))
    p.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = gsnr([p])["0"]
    with torch.device("meta"):
        assert gsnr([p])["0"] == expected


def test_a_checkpoint_that_lacks_a_number_is_completed():
    optimizer = FusedSGDSaI([p := Parameter(torch.ones(4))])
    p.grad = torch.arange(4.0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["stage"]
    with torch.device("meta"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[p]["stage"] == 3

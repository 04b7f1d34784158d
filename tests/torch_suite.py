"""The tables of PyTorch's generic optimizer checks, and the problem that they are run on."""

import copy

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import optim_db

from fused_momentum import FusedMomentum, FusedNAG, FusedSGD, FusedSGDSaI

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)
SUBJECTS = (FusedSGD, FusedMomentum, FusedNAG, FusedSGDSaI)
subjects = pytest.mark.parametrize("cls", SUBJECTS, ids=lambda c: c.__name__)


def _rows():
    """Every optimizer input of torch's table; the classical rules have no variants of torch's."""
    for cls in SUBJECTS:
        for row in INFO.optim_inputs_func(device="cpu"):
            if cls is FusedSGD or not row.kwargs.keys() & {"dampening", "nesterov"}:
                name = f"{cls.__name__}-{row.desc.replace(' ', '_')}"
                yield pytest.param(cls, row.kwargs, id=name)


grid = pytest.mark.parametrize(("cls", "kwargs"), list(_rows()))


class Problem:
    """Least squares with one matrix and one vector: loss = |W x + b|^2."""

    def __init__(self, strided=False):
        weight, bias = torch.randn(10, 5, 2), torch.randn(10, 2)
        first = (weight[..., 0], bias[..., 0])
        self.params = [Parameter(t if strided else t.contiguous()) for t in first]
        self.x = torch.randn(5)

    def loss(self):
        weight, bias = self.params
        return (weight.mv(self.x) + bias).square().sum()

    def closure(self):
        for p in self.params:
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def train(self, opt, steps=3):
        return [opt.step(self.closure).item() for _ in range(steps)]


def make(cls, kwargs, problem, **more):
    return cls(problem.params, **copy.deepcopy(kwargs), **more)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.params, second.params, strict=True))

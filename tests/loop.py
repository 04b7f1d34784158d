"""A small model, a plain training loop over it, and the classes that are put through loops."""

import pytest
import torch
from torch.nn import Module, Parameter
from twin import HEAVY, STEPS

from fused_momentum import FusedAutoSGM, FusedMomentum, FusedNAG, FusedSGD, FusedSGDSaI

CLASSICAL = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
SUBJECTS = {
    "sgd": (FusedSGD, HEAVY),
    "momentum": (FusedMomentum, CLASSICAL),
    "nag": (FusedNAG, CLASSICAL),
    "sgd_sai": (FusedSGDSaI, CLASSICAL),
    "autosgm": (FusedAutoSGM, {"lr": 0.1, "rc_cfg": (1, 0, 0.1, 2, 1, 2, 2, 1, 0)}),
    "autosgm_clipped": (FusedAutoSGM, {"lr": 0.1, "lr_cfg": (True, 0.1, 2), "wd_cfg": (0.05, 1)}),
    "sgd_sai_max": (FusedSGDSaI, CLASSICAL | {"scale": "gsnr_max", "degenerate": "defer"}),
}
subjects = pytest.mark.parametrize(("cls", "kwargs"), SUBJECTS.values(), ids=SUBJECTS)


class Net(Module):
    """loss = sum (p - 1)^2 / 2: elementwise, so its gradient has the same bits in any layout."""

    def __init__(self):
        super().__init__()
        maker = torch.Generator().manual_seed(1)
        self.matrix = Parameter(torch.randn(6, 7, generator=maker))
        self.filters = Parameter(torch.randn(2, 3, 4, 4, generator=maker))
        self.scalar = Parameter(torch.randn((), generator=maker))

    def forward(self):
        return sum((p - 1).square().sum() / 2 for p in self.parameters())


def train(net, opt, steps=range(STEPS), before=lambda net, opt, step: None):
    for step in steps:
        before(net, opt, step)
        opt.zero_grad()
        net().backward()
        opt.step()
    return net


def undisturbed(cls, kwargs):
    net = Net()
    return train(net, cls(net.parameters(), **kwargs))


def assert_same(net, other):
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), f"{name} differs"

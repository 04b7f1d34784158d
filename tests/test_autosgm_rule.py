"""AutoSGM's rule, run by the reference on single tensors, against the float64 model."""

import itertools

import pytest
import torch
from autosgm_cases import CASES, LIMIT, RATES, STEPS, ZEROS, gaps, settings_of, values
from autosgm_model import BETA, LR, WINDOW, Model

from fused_momentum import reference
from fused_momentum.rules.autosgm import AUTOSGM


class Tensor:
    """One parameter with the states that the rule asks for, moved by the reference."""

    def __init__(self, start, dtype=torch.float64, **settings):
        self.p = start.to(dtype).clone()
        self.group = {
            "lr_cfg": LR, "beta_cfg": BETA, "rc_cfg": WINDOW, "wd_cfg": (0.0, 0),
            "eps_cfg": (1e-10,), "maximize": False, "compat": "fixed", **settings,
        }  # fmt: skip
        self.group["lr"] = self.group["lr_cfg"][1]
        self.held = {}
        self.t = 0

    def step(self, grad):
        self.t += 1
        hyper = AUTOSGM.read(self.group, self.t)
        on = dict(zip(AUTOSGM.hyper, hyper, strict=True))
        states, kept = [], []
        for entry in AUTOSGM.states:
            zeros = torch.zeros_like(self.p)
            states.append(self.held.setdefault(entry.name, zeros) if on[entry.when] else None)
        for entry in AUTOSGM.kept:
            zero = torch.zeros((), dtype=torch.float64)
            kept.append(self.held.setdefault(entry.name, zero) if on[entry.when] else None)
        sign = -1.0 if self.group["maximize"] else 1.0
        grad = grad.to(self.p.dtype)
        update = reference.Update(AUTOSGM, self.p, grad, states, kept, hyper, grad_multiplier=sign)
        if not update.settled():
            update.measure()
        update.update()


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("zero", ZEROS)
def test_every_configuration(rate, zero):
    cases = [case for case in CASES if case[:2] == (rate, zero)]
    for case, shape in zip(cases, itertools.cycle([(7,), (), (3, 2)]), strict=False):
        settings = settings_of(case)
        model = Model(values(0, *shape), **settings)
        ours = {dtype: Tensor(values(0, *shape), dtype, **settings) for dtype in LIMIT}
        for t in range(1, STEPS + 1):
            model.step(values(t, *shape))
            for dtype, tensor in ours.items():
                tensor.step(values(t, *shape))
                assert max(gaps(tensor.p, tensor.held, model)) <= LIMIT[dtype], (case, dtype, t)

"""Small steps with everything that kernels do, for compute-sanitizer; run by `make gpu`.

So few that memcheck and racecheck, under which a kernel takes many times as long, need minutes.
"""

import pytest
import torch
from cases import FORMS, TYPES, VARIANTS, Form, Run, differing, rules
from test_gpu import KINDS
from torch.nn import Parameter

import fused_momentum as fm

pytestmark = pytest.mark.gpu
SOME = [form for name, form in FORMS.items() if name != "100003"]


@KINDS
@rules
@pytest.mark.parametrize("key", ["f32", "bf16", "f64_state_f16"])
def test_all_forms_in_one_step(rule, backend, key):
    forms = (*SOME, Form((5000,)))  # of several tiles, whose sums meet in shared memory
    runs = [Run(VARIANTS[rule.name], forms, TYPES[key], b) for b in (backend, "reference")]
    for run in runs:
        run.train(range(2))
    assert not differing(*runs)


@KINDS
@pytest.mark.parametrize("rule", ["sgd", "sgd_sai"])
def test_more_tensors_than_arguments_hold(backend, rule):
    """The table is in device memory, and is replaced by a longer one."""
    runs = []
    for name in (backend, "reference"):
        params = [Parameter(torch.full((1 + i % 3,), 0.5 + i, device="cuda")) for i in range(1500)]
        optimizer = (fm.FusedSGD if rule == "sgd" else fm.FusedSGDSaI)(params, 0.1, backend=name)
        for used in (params[:1400], params):
            for i, p in enumerate(used):
                p.grad = torch.full_like(p, 0.1 * i)
            optimizer.step()
        runs.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))

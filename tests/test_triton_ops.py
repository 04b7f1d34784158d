"""The functional ops on the Triton kernels, interpreted: the code that runs on CUDA tensors."""

import pytest
import torch
from cases import FORMS, LAYOUTS, OP_VARIANTS, bits, update, values
from interpreter import interpreted_fixture  # noqa: F401

import fused_momentum as fm

SOME = [FORMS[key] for key in ("0", "7", "1025", "channels_last", "transposed_grad", "lazy_grad")]


def lists_of(rule, dtype):
    lists = []
    for k in range(2 + len(rule.states)):
        layouts = [form.grad_layout if k == 1 else form.layout for form in SOME]
        tensors = [values(form.shape, dtype, 9 * k + i) for i, form in enumerate(SOME)]
        lists.append([LAYOUTS[key](t) for key, t in zip(layouts, tensors, strict=True)])
    return lists


def check(name, dtype, flags):
    from fused_momentum.kernels import launch

    from fused_momentum.backends import PREFERENCE

    variant = OP_VARIANTS[name]
    lists, expected = lists_of(variant.rule, dtype), lists_of(variant.rule, dtype)
    for streams in zip(*expected, strict=True):
        update("reference", variant.rule, streams, variant.hyper, **flags)
    launches, versions = [], [[t._version for t in tensors] for tensors in lists]

    def counted(*args, **options):
        launches.append(args[0].__name__)
        real(*args, **options)

    real = launch.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PREFERENCE, "cpu", ("triton",))
        patch.setattr(launch, "launch", counted)
        getattr(fm.ops, f"{variant.name}_")(*lists, **variant.hyper, **flags)
    assert launches == ["pass_kernel"]
    for k, (tensors, others) in enumerate(zip(lists, expected, strict=True)):
        for i, (t, other) in enumerate(zip(tensors, others, strict=True)):
            assert torch.equal(bits(t), bits(other)), f"stream {k} of tensor {i}"
            assert (t._version > versions[k][i]) == (k != 1)


CASES = [(name, torch.float32, {}) for name in OP_VARIANTS]
CASES += [("sgd", torch.complex128, {"first": True, "maximize": True})]


@pytest.mark.parametrize(("name", "dtype", "flags"), CASES, ids=str)
def test_one_launch_with_the_references_bits(name, dtype, flags, interpreted):
    interpreted(check, name, dtype, flags)


def check_captured():
    from fused_momentum.kernels import table

    from fused_momentum.backends import PREFERENCE

    before = len(fm.ops._launchers_of_graphs)
    for capturing in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PREFERENCE, "cpu", ("triton",))
            patch.setattr(table, "is_capturing", lambda device, now=capturing: now)
            p, g = torch.ones(5), torch.ones(5)
            fm.ops.sgd_([p], [g], lr=0.5)
        assert p.tolist() == [0.5] * 5
        assert len(fm.ops._launchers_of_graphs) == before + capturing


def test_what_a_graph_reads_is_kept_alive(interpreted):
    interpreted(check_captured)

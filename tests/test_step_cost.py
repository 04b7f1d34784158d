"""What a step costs: even shares of the tiles, no allocation, a small plan."""

import itertools

import pytest
import torch
from cases import (
    CLASSES,
    EXTENSION,
    FORMS,
    TILE,
    TYPES,
    VARIANTS,
    Run,
    accepted,
    bits,
    compiled,
    one_thread,  # noqa: F401  a fixture for every test here
    rules,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from fused_momentum.plan import Plan

# --- tiles -----------------------------------------------------------------------------------

SEGMENT_COST = 32  # elements; what csrc/tiles.h charges for a tensor besides its own
numels = st.lists(
    st.integers(0, 3) | st.integers(0, 5 * TILE) | st.integers(0, 10**7), min_size=1, max_size=60
)


@settings(deadline=None, max_examples=300)
@given(numels, st.integers(1, 70))
def test_tiles_are_split_once_and_evenly(numels, parts):
    starts = [0]  # cost of all that lies before each tile
    for n in numels:
        for tile in range(0, n, TILE):
            last = tile + TILE >= n
            starts.append(starts[-1] + (n - tile + SEGMENT_COST if last else TILE))
    bounds = EXTENSION.split(numels, parts)
    assert len(bounds) == parts + 1
    assert (bounds[0], bounds[-1]) == (0, len(starts) - 1)
    assert bounds == sorted(bounds)
    costs = [starts[end] - starts[begin] for begin, end in itertools.pairwise(bounds)]
    # A part begins at the last tile that starts before its even share; it may be late by that tile.
    assert max(costs) <= starts[-1] / parts + TILE + SEGMENT_COST


# --- what a step costs -----------------------------------------------------------------------


SOME_TYPES = ("f32", "bf16", "c64", "f64_state_f16")


def _allocations(function):
    """Bytes of every tensor allocation while a function runs."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


@rules
@pytest.mark.parametrize("types", [TYPES[key] for key in SOME_TYPES], ids=SOME_TYPES)
@compiled
def test_a_steady_step_allocates_nothing_and_moves_nothing(rule, types, backend):
    forms = [form for form in FORMS.values() if form.grad_layout != "lazy"]
    run = Run(VARIANTS[rule.name], forms, types, backend)
    run.opt.param_groups[0].update(run.variant.hyper)
    for p, grad in zip(run.params, run.grads(0), strict=True):
        p.grad = grad
    assert _allocations(run.opt.step), "the first step allocates the state"
    addresses = [t.data_ptr() for _, t in run.tensors()]
    before = [bits(p) for p in run.params]
    assert not _allocations(lambda: [run.opt.step() for _ in range(3)])
    assert [t.data_ptr() for _, t in run.tensors()] == addresses
    assert not any(
        torch.equal(bits(p), b) for p, b in zip(run.params, before, strict=True) if p.numel()
    )


@rules
def test_a_steady_step_is_one_call_also_beside_frozen_parameters(rule, monkeypatch):
    frozen, empty, p = (Parameter(torch.ones(n)) for n in (3, 0, 3))
    optimizer = CLASSES[rule.name]([frozen, empty, p], lr=0.1, backend="cpu")
    empty.grad, p.grad = torch.ones(0), torch.linspace(-1, 2, 3)
    for _ in range(2):
        optimizer.step()
    before = bits(p)
    monkeypatch.delattr(Plan, "_prepare")
    optimizer.step()
    assert not torch.equal(bits(p), before)


@rules
def test_the_plan_holds_under_200_bytes_a_tensor(rule):
    def size(count):
        params = [Parameter(torch.zeros(2, 3)) for _ in range(count)]
        for p in params:
            p.grad = torch.zeros(2, 3)
        cls = CLASSES[rule.name]
        optimizer = cls(params, lr=0.1, backend="cpu", **accepted(cls, momentum=0.9))
        for _ in range(2):
            optimizer.step()
        return optimizer._plan.bytes

    small, large = size(1000), size(3000)
    assert small < large, "bytes() does not see the tensors"
    # Each further number that a rule keeps per tensor is one more to look up; of a state the
    # storage is held, weakly, besides.
    further = 2 * (len(rule.states) - 1) + len(rule.kept) + (rule.read is not None)
    assert large < (200 + 8 * further) * 3000

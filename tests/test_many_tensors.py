"""What only many tensors, or large ones, show: the walk and the passes on several threads."""

import pytest
import torch
from cases import (
    EXTENSION,
    bits,
    compiled,
    nested_parameter,
    one_thread,  # noqa: F401  brings back the number of threads that a test has changed
)
from torch.nn import Parameter

import fused_momentum as fm

THREADS = pytest.mark.parametrize("threads", [1, 2, 3])
# So many that the walk gives some to a third thread.
COUNT = 2 * EXTENSION.TENSORS_PER_THREAD + 100


def made(cls, shapes, backend, **settings):
    """An optimizer over parameters that are the same for every back-end."""
    maker = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=maker)) for shape in shapes]
    return cls(params, lr=0.1, backend=backend, **settings)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_grads(optimizer, step):
    maker = torch.Generator().manual_seed(step + 1)
    for p in params_of(optimizer):
        p.grad = torch.randn(p.shape, generator=maker)


def same(optimizer, other):
    for p, q in zip(params_of(optimizer), params_of(other), strict=True):
        assert torch.equal(bits(p), bits(q))
        mine, others = optimizer.state[p], other.state[q]
        assert mine.keys() == others.keys()
        assert all(torch.equal(bits(mine[key]), bits(others[key])) for key in mine)


# --- many ------------------------------------------------------------------------------------
# What happens to one tensor in ten, at another tenth each time.


def nothing(optimizer, p):
    pass


def no_grad(optimizer, p):
    p.grad = None


def moved(optimizer, p):
    p.data = p.data.clone()


def another_shape_in_memory(optimizer, p):
    p.data = torch.stack([p.data, p.data], -1)[..., 0]


def another_state(optimizer, p):
    optimizer.state[p]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"] * 2


def state_moved(optimizer, p):
    optimizer.state[p]["momentum_buffer"].data = optimizer.state[p]["momentum_buffer"].data * 3


def state_last(optimizer, p):
    optimizer.state[p] = dict(reversed(optimizer.state[p].items()))


def state_lost(optimizer, p):
    del optimizer.state[p]["momentum_buffer"]


EVENTS = [nothing, no_grad, moved, another_shape_in_memory, another_state, state_moved, state_last]
EVENTS += [state_lost, nothing]


@compiled
@pytest.mark.parametrize("cls", [fm.FusedSGD, fm.FusedSGDSaI])
def test_what_becomes_of_a_few_of_many_is_noticed(cls, backend):
    shapes = [(i % 5 + 1, 2) for i in range(COUNT)]
    truth, *optimizers = (made(cls, shapes, b, momentum=0.5) for b in ("reference", *[backend] * 3))
    for step, event in enumerate(EVENTS):
        for threads, each in enumerate([truth, *optimizers]):
            torch.set_num_threads(max(threads, 1))
            give_grads(each, step)
            if step > 0:
                for p in params_of(each)[step::10]:
                    event(each, p)
            each.step()
        for optimizer in optimizers:
            same(optimizer, truth)


@THREADS
def test_versions_and_moves_are_counted_once(threads):
    torch.set_num_threads(threads)
    optimizer = made(fm.FusedSGD, [(3,)] * COUNT, "cpu", momentum=0.5)
    give_grads(optimizer, 0)
    optimizer.step()
    before = [p._version for p in params_of(optimizer)]
    plan, walk = optimizer._plan, optimizer._plan._walks["cpu"]
    moves, generation = plan.moves, walk.generation
    optimizer.step()
    assert [p._version for p in params_of(optimizer)] == [v + 1 for v in before]
    assert (plan.moves, walk.generation) == (moves, generation)
    some = params_of(optimizer)[::10]
    for p in some:
        p.data = p.data.clone()
    optimizer.step()
    assert plan.moves == moves + len(some)
    assert walk.generation > generation


@pytest.mark.parametrize("at", [0, COUNT // 2, COUNT - 1])
def test_an_error_among_many_changes_nothing(at):
    torch.set_num_threads(3)
    optimizer = made(fm.FusedSGD, [(3,)] * COUNT, "cpu", momentum=0.5)
    give_grads(optimizer, 0)
    optimizer.step()
    params = params_of(optimizer)
    before = [p.detach().clone() for p in params]
    params[at].grad_dtype = None
    params[at].grad = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=rf"\['params'\]\[{at}\]"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_thread_never_asks_python_for_sizes(layout):
    """The sizes of a jagged tensor are Python's; a thread that asked would wait for the caller."""
    torch.set_num_threads(3)
    optimizer = made(fm.FusedSGD, [(3,)] * COUNT, "cpu", momentum=0.5)
    give_grads(optimizer, 0)
    optimizer.step()
    torch.utils.swap_tensors(params_of(optimizer)[-5], nested_parameter(layout))
    with pytest.raises(TypeError, match=rf"\['params'\]\[{COUNT - 5}\] is a nested tensor"):
        optimizer.step()


@THREADS
@compiled
def test_every_tensor_is_updated_with_its_own_settings(backend, threads):
    """Groups differ, and in each some tensors take their first step later than their neighbours."""
    torch.set_num_threads(threads)
    results = []
    for name in (backend, "reference"):
        optimizer = made(fm.FusedSGD, [(3,)] * 4, name, momentum=0.5, dampening=0.25)
        for settings in ({"lr": 0.2}, {"momentum": 0.0}, {"dampening": 0.75}, {"maximize": True}):
            params = [Parameter(torch.ones(n)) for n in (2, 5, 1, 130)]
            optimizer.add_param_group({"params": params, **settings})
        for step in range(3):
            give_grads(optimizer, step)
            for p in params_of(optimizer)[1::2] if step == 0 else ():
                p.grad = None
            optimizer.step()
        results.append(optimizer)
    same(*results)


# --- large -----------------------------------------------------------------------------------

TILE = EXTENSION.TILE
# Around what csrc/cpu/run.cpp measures at a time (32 Ki elements a thread); one has none.
SIZES = [(40 * TILE + 3,), (5,), (0,), (31 * TILE,), (TILE,), (1,), (64 * TILE + 1,), (2 * TILE,)]


@THREADS
@compiled
@pytest.mark.parametrize("numerator", range(5))
def test_autosgm_measures_a_few_tensors_at_a_time(numerator, backend, threads):
    torch.set_num_threads(threads)
    settings = {"lr_cfg": (True, 0.01, numerator)}
    optimizer, truth = (made(fm.FusedAutoSGM, SIZES, b, **settings) for b in (backend, "reference"))
    for step in range(3):
        for each in (optimizer, truth):
            give_grads(each, step)
            each.step()
        same(optimizer, truth)


@THREADS
@compiled
@pytest.mark.parametrize("what", ["loses_its_gradient", "begins_anew"])
def test_one_tensor_is_measured_beside_others_that_are_not(what, backend, threads):
    """Two gradients are zero at first, so that they are measured later than the third."""
    torch.set_num_threads(threads)
    results = []
    for name in (backend, "reference"):
        optimizer = made(fm.FusedSGDSaI, [(40 * TILE,)] * 3, name, momentum=0.9)
        first, second, third = params_of(optimizer)
        for step in range(4):
            give_grads(optimizer, step)
            if step == 0:
                first.grad.zero_()
                second.grad.zero_()
            elif step == 1 and what == "loses_its_gradient":
                first.grad = None
            elif step == 2 and what == "begins_anew":
                del optimizer.state[third]
            optimizer.step()
        results.append(optimizer)
    same(*results)


@THREADS
@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_last_tile_and_the_ones_before_it(dtype, backend, threads):
    """They are updated in other portions: kAhead in csrc/cpu/pass.h."""
    torch.set_num_threads(threads)
    results = []
    numels = [1, 127, 128, 129, TILE - 1, TILE, TILE + 1, TILE + 127, TILE + 129, 2 * TILE]
    numels += [3 * TILE + 5, 90 * TILE + 77]
    for name in (backend, "reference"):
        optimizer = made(fm.FusedSGD, [(n,) for n in numels], name, momentum=0.5, weight_decay=0.1)
        for p in params_of(optimizer):
            p.data = p.data.to(dtype)
        for step in range(2):
            maker = torch.Generator().manual_seed(step + 1)
            for p in params_of(optimizer):
                p.grad = torch.randn(p.shape, generator=maker).to(dtype)
            optimizer.step()
        results.append(optimizer)
    same(*results)


STORED = {
    "f32": (torch.float32, lambda t: t),
    "bf16": (torch.bfloat16, lambda t: t),
    "f16": (torch.float16, lambda t: t),
    "f64": (torch.float64, lambda t: t),
    "strided": (torch.float32, lambda t: t.t()),
}


@THREADS
@compiled
@pytest.mark.parametrize("other", STORED)
@pytest.mark.parametrize("one", STORED)
def test_neighbours_that_are_stored_in_different_ways(one, other, backend, threads):
    """What one tensor is updated with may be that of the next: csrc/cpu/pass.h."""
    torch.set_num_threads(threads)
    results = []
    for name in (backend, "reference"):
        optimizer = made(fm.FusedSGD, [(3, 5)] * 7, name, momentum=0.5, weight_decay=0.1)
        kinds = [STORED[kind] for kind in (one, other, one, one, other, other, one)]
        for p, (dtype, turned) in zip(params_of(optimizer), kinds, strict=True):
            p.data = turned(p.data.to(dtype))
        for step in range(2):
            maker = torch.Generator().manual_seed(step + 1)
            for p in params_of(optimizer):
                p.grad = torch.randn(p.shape, generator=maker).to(p.dtype)
            optimizer.step()
        results.append(optimizer)
    same(*results)


def test_a_frozen_parameter_needs_no_row_of_hyper_parameters():
    """AutoSGM's are worked out in Python for each step that some tensor takes."""
    optimizer = made(fm.FusedAutoSGM, [(3,), (4,)], "cpu")
    params_of(optimizer)[0].grad = torch.ones(3)
    for _ in range(3):
        optimizer.step()
    assert len(optimizer._plan._walks["cpu"].hyper()) == 1

"""What test_shards.py runs in two processes at once: sharded training against plain training.

A case is a function of a mesh of two processes. All its gradients are given, so that a sharded run
must end with the same bits as one of whole tensors.
"""

import copy
from functools import partial

import pytest
import torch
from loop import CLASSICAL, SUBJECTS
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Linear, Parameter, ReLU, Sequential

import fused_momentum as fm
from fused_momentum import shards

STEPS = 4
SHAPES = [(6, 5), (5, 4), (1,), (2, 3, 4), ()]  # in halves, unevenly, with nothing in one process
PLACEMENTS = [Shard(0), Shard(0), Shard(0), Shard(1), Replicate()]
CASES = {}


def case(**variants):
    """Register a function, or several of its calls by name."""

    def register(function):
        for name, arguments in (variants or {"": ()}).items():
            full = f"{function.__name__}{name and '-'}{name}"
            CASES[full] = partial(_call, function, arguments)
        return function

    return register


def _call(function, arguments, mesh):
    function(mesh, *arguments)


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(tensor, mesh, placement):
    replicated = [Replicate()] * (mesh.ndim - 1)
    return distribute_tensor(tensor, mesh, [*replicated, placement], src_data_rank=None)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_of(mesh):
    return [spread(torch.ones(4), mesh, Shard(0))]


class Run:
    """Parameters, sharded over a mesh or whole (None), and their optimizer."""

    def __init__(self, mesh, cls=fm.FusedSGD, kwargs=CLASSICAL, sharded=(True,) * 5, **more):
        self.placed = [
            (lambda t, at=placement: spread(t, mesh, at)) if mesh and here else torch.clone
            for placement, here in zip(PLACEMENTS, sharded, strict=True)
        ]
        tensors = [random(shape, i) for i, shape in enumerate(SHAPES)]
        self.params = [Parameter(place(t)) for place, t in zip(self.placed, tensors, strict=True)]
        self.optimizer = cls(self.params, **kwargs, **more)

    def set_grads(self, t, factor=1.0):
        for i, (p, place) in enumerate(zip(self.params, self.placed, strict=True)):
            p.grad = place(random(p.shape, 100 * t + i) * factor)

    def train(self, steps=range(STEPS), **factors):
        for t in steps:
            self.set_grads(t, factors.get(f"step{t}", 1.0))
            self.optimizer.step()
        return self

    def tensors(self):
        """Everything there is, whole, by name."""
        return {
            f"{name} of {i}": whole(tensor.detach())
            for i, p in enumerate(self.params)
            for name, tensor in {"value": p, **self.optimizer.state[p]}.items()
        }

    def assert_same(self, other):
        mine, theirs = self.tensors(), other.tensors()  # all collectives first: none may be left
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


ELEMENTWISE = {k: v for k, v in SUBJECTS.items() if k not in ("sgd_sai_max", "autosgm_clipped")}
SCALES = {
    "largest": {"scale": "gsnr_max"},
    "sqrt_numel": {"scale": "sqrt_numel"},
    "official": {"degenerate": "official"},
    "momentum_0": {"momentum": 0.0},
}


@case(
    **{
        f"{name}-{backend}": (cls, kwargs | {"backend": backend})
        for name, (cls, kwargs) in ELEMENTWISE.items()
        for backend in ("cpu", "reference")
    },
    **{f"sgd_sai-{name}": (fm.FusedSGDSaI, CLASSICAL | more) for name, more in SCALES.items()},
)
def same_bits_as_whole_tensors(mesh, cls, kwargs):
    Run(mesh, cls, kwargs).train().assert_same(Run(None, cls, kwargs).train())


@case(plain=(fm.FusedSGD,), measured=(fm.FusedSGDSaI,))
def sharded_beside_whole(mesh, cls):
    some = (True, False, True, False, True)
    Run(mesh, cls, sharded=some).train().assert_same(Run(None, cls).train())


@case(plain=(fm.FusedSGD,), measured=(fm.FusedSGDSaI,))
def replicated_along_the_first_dimension_of_a_mesh(mesh, cls):
    mesh = init_device_mesh("cpu", (2, 1))
    Run(mesh, cls).train().assert_same(Run(None, cls).train())


@case()
def one_tensor_at_a_time(mesh):
    runs = Run(mesh), Run(None)
    for run in runs:
        for t in range(STEPS):
            run.set_grads(t)
            for i in (3, 0, 4, 1, 2):
                run.optimizer.step_params(run.params[i])
    runs[0].assert_same(runs[1])


@case(
    partial=(fm.FusedSGD, [Partial()]),
    partial_measured=(fm.FusedSGDSaI, [Partial()]),
    replicated=(fm.FusedSGD, [Replicate()]),
    now_and_then=(fm.FusedSGD, [Partial(), None, Replicate(), None]),
)
def gradients_that_are_laid_out_otherwise(mesh, cls, placements):
    run, twin = Run(mesh, cls), Run(None, cls)
    for t in range(STEPS):
        run.set_grads(t)
        twin.set_grads(t)
        placement = placements[t % len(placements)]
        for p in run.params if placement else ():
            # Halves are exact, and so is their sum.
            mine = whole(p.grad) / (2 if placement.is_partial() else 1)
            p.grad = DTensor.from_local(mine, mesh, [placement], run_check=False)
        run.optimizer.step()
        twin.optimizer.step()
    run.assert_same(twin)


@case(
    zeros_first=({"step0": 0.0}, False),
    initialised=({}, True),
    initialised_with_zeros=({"step0": 0.0, "step1": 0.0}, True),
)
def scales_that_come_before_or_after_the_first_step(mesh, factors, initialise):
    runs = Run(mesh, fm.FusedSGDSaI), Run(None, fm.FusedSGDSaI)
    for run in runs:
        if initialise:
            run.set_grads(0, factors.get("step0", 1.0))
            run.optimizer.initialise()
        run.train(**factors)
    runs[0].assert_same(runs[1])


@case()
def a_moved_gradient_takes_one_collective_a_step(mesh):
    """However often a step looks: at the first one, states are lacking."""
    for cls in (fm.FusedSGD, fm.FusedSGDSaI):
        run = Run(mesh, cls)
        for t in range(3):
            run.set_grads(t)
            mine = whole(run.params[0].grad) / 2
            run.params[0].grad = DTensor.from_local(mine, mesh, [Partial()], run_check=False)
            with CommDebugMode() as count:
                run.optimizer.step()
            # SGD-SaI measures once, all tensors together.
            measures = cls is fm.FusedSGDSaI and t == 0
            assert count.get_total_counts() == 1 + measures, f"{cls.__name__}, step {t}"


@case()
def processes_that_measure_different_tensors(mesh):
    """Nobody takes the sums of one for those of another."""
    run = Run(mesh, fm.FusedSGDSaI)
    run.set_grads(0)
    run.params[mesh.get_rank()].grad = None
    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\] is measured by 1 of 2 processes"):
        run.optimizer.step()
    run.set_grads(0)
    run.optimizer.step()
    twin = Run(None, fm.FusedSGDSaI)
    twin.set_grads(0)
    twin.optimizer.step()
    run.assert_same(twin)


@case(sgd=(fm.FusedSGD,), sgd_sai=(fm.FusedSGDSaI,), autosgm=(fm.FusedAutoSGM,))
def a_parameter_of_other_processes(mesh, cls):
    """A mesh of the first process alone: the second holds nothing of it."""
    small = DeviceMesh("cpu", [0])
    p = Parameter(distribute_tensor(random((6, 4), 0), small, [Shard(0)], src_data_rank=None))
    p.grad = distribute_tensor(random((6, 4), 1), small, [Shard(0)], src_data_rank=None)
    optimizer = cls([p], lr=0.1)
    optimizer.step()
    optimizer.step()
    assert p.to_local().numel() == (24 if mesh.get_rank() == 0 else 0)


@case()
def parts_that_are_offloaded(mesh):
    """FSDP2's CPUOffloadPolicy: parts on the CPU, of a mesh of GPUs. Here the mesh says meta."""
    part, tensor = torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(6, 4)
    p = spread(tensor, mesh, Shard(0))
    try:
        mesh._device_type = "meta"
        state = shards.like(p, part)
    finally:
        mesh._device_type = "cpu"
    assert state.to_local().data_ptr() == part.data_ptr()
    assert (state.shape, state.placements) == (p.shape, p.placements)
    assert state.dtype == state._spec.tensor_meta.dtype == part.dtype


@case()
def scales_of_a_model_are_those_of_whole_tensors(mesh):
    scales = []
    for run in (Run(mesh), Run(None)):
        run.set_grads(0)
        scales.append(fm.gsnr(run.params))
    assert scales[0] == scales[1]


@case(
    sgd=(fm.FusedSGD, CLASSICAL),
    sgd_sai=(fm.FusedSGDSaI, CLASSICAL),
    autosgm=SUBJECTS["autosgm"],
)
def training_goes_on_from_a_checkpoint(mesh, cls, kwargs):
    through, plain = Run(mesh, cls, kwargs).train(range(2)), Run(None, cls, kwargs).train(range(2))
    saved = copy.deepcopy((through.params, through.optimizer.state_dict()))
    whole_saved = copy.deepcopy(plain.optimizer.state_dict())
    through.train(range(2, STEPS))
    for state in (saved[1], whole_saved):  # of the same shards, and of one process
        resumed = Run(mesh, cls, kwargs)
        with torch.no_grad():
            for p, q in zip(resumed.params, saved[0], strict=True):
                p.copy_(q)
        resumed.optimizer.load_state_dict(state)
        resumed.train(range(2, STEPS)).assert_same(through)
    copied = copy.deepcopy(through)
    copied.train(range(STEPS, STEPS + 2)).assert_same(through.train(range(STEPS, STEPS + 2)))


def network():
    maker = torch.Generator().manual_seed(1)
    model = Sequential(Linear(7, 5), ReLU(), Linear(5, 3), ReLU(), Linear(3, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-4, 5, p.shape, generator=maker) / 4)
    return model


def train_network(model, optimizer, steps=range(3)):
    for t in steps:
        # Small integers: all sums over a batch are exact, in whatever order.
        x = torch.randint(-2, 3, (4, 7), generator=torch.Generator().manual_seed(t)).float()
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()


@case(sgd=(fm.FusedSGD,), nag=(fm.FusedNAG,), sgd_sai=(fm.FusedSGDSaI,))
def fully_sharded(mesh, cls):
    """FSDP2 as its users have it, and its checkpoints."""
    kwargs = {"lr": 2.0**-6, "momentum": 0.5, "weight_decay": 0.0}
    models = []
    for _ in range(2):
        models.append(network())
        for layer in models[-1]:
            fully_shard(layer, mesh=mesh)
        fully_shard(models[-1], mesh=mesh)
    optimizers = [cls(model.parameters(), **kwargs) for model in models]
    train_network(models[0], optimizers[0])
    models[1].load_state_dict(models[0].state_dict())
    saved = dcp.get_optimizer_state_dict(models[0], optimizers[0])
    dcp.set_optimizer_state_dict(models[1], optimizers[1], copy.deepcopy(saved))
    for model, optimizer in zip(models, optimizers, strict=True):
        train_network(model, optimizer, range(3, 5))
    twin = network()
    train_network(twin, cls(twin.parameters(), **kwargs), range(5))
    for p, q, r in zip(*(m.parameters() for m in (*models, twin)), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())
        torch.testing.assert_close(p.full_tensor(), r)


@case(cpu=("cpu",), reference=("reference",))
def version_counters_move(mesh, backend):
    run = Run(mesh, backend=backend)
    parts = [p.to_local() for p in run.params]
    before = [t._version for t in (*run.params, *parts)]
    run.train(range(1))
    assert [t._version for t in (*run.params, *parts)] == [v + 1 for v in before]


@case()
def nothing_is_copied(mesh):
    run = Run(mesh).train(range(1))

    def addresses():
        tensors = [*run.params, *(s["momentum_buffer"] for s in run.optimizer.state.values())]
        return [t.to_local().data_ptr() for t in tensors]

    before = addresses()
    run.train()
    assert addresses() == before


@case(flat=(True,), flat_grads=("grads",))
def flat_buffers_hold_what_is_not_sharded(mesh, flatten):
    some = (True, False, True, False, True)
    run, before = Run(mesh, sharded=some, flatten=flatten), []
    for t in range(STEPS):
        for i, (p, place) in enumerate(zip(run.params, run.placed, strict=True)):
            grad = place(random(p.shape, 100 * t + i))
            if p.grad is None:
                p.grad = grad
            else:
                p.grad.copy_(grad)
        run.optimizer.step()
        addresses = [run.params[i].data_ptr() for i in (1, 3)]
        addresses += [run.params[i].grad.data_ptr() for i in (1, 3) if flatten == "grads"]
        assert t == 0 or addresses == before
        before = addresses
        run.optimizer.zero_grad()
        kept = [run.params[i].grad is not None for i in range(5)]
        assert kept == [flatten == "grads" and not here for here in some]
    run.assert_same(Run(None).train())
    (buffer,) = run.optimizer.flatten()
    begin = buffer.data_ptr()
    inside = range(begin, begin + buffer.numel() * buffer.element_size())
    assert all(run.params[i].data_ptr() in inside for i in (1, 3))


@case(sgd=(fm.FusedSGD, {}), sgd_sai=(fm.FusedSGDSaI, {"eps": 1.0}))
def overflow_skips_the_step(mesh, cls, kwargs):
    run = Run(mesh, cls, CLASSICAL | kwargs, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [whole(p.detach()).clone() for p in run.params]
    for t, factor in enumerate((float("inf"), 4.0)):
        scaler.scale(torch.ones(()))
        run.set_grads(t, factor)
        scaler.step(run.optimizer)
        scaler.update(4.0)
        if t == 0:
            assert all(torch.equal(whole(p), q) for p, q in zip(run.params, before, strict=True))
            assert not run.optimizer.state
    run.assert_same(Run(None, cls, CLASSICAL | kwargs).train(range(1, 2)))


@case(cpu=("cpu",), reference=("reference",))
def errors(mesh, backend):
    """Named, before anything has changed."""

    def refused(run, error, message, make=lambda run: None):
        before = [whole(p.detach()).clone() for p in run.params]
        make(run)
        with pytest.raises(error, match=message):
            run.train(range(1))
        assert all(torch.equal(whole(p), q) for p, q in zip(run.params, before, strict=True))

    cls, kwargs = SUBJECTS["autosgm_clipped"]
    clipped = Run(mesh, cls, kwargs, backend=backend)
    refused(clipped, TypeError, r"param_groups\[0\]\['params'\]\[0\] is a DTensor, .*autosgm")
    assert not clipped.optimizer.state
    defers = Run(mesh, fm.FusedSGDSaI, degenerate="defer", backend=backend)
    refused(defers, ValueError, r"degenerate='defer', but \['params'\]\[0\] is a DTensor")
    assert not defers.optimizer.state

    def whole_state(run):
        run.optimizer.state[run.params[1]]["momentum_buffer"] = torch.zeros(5, 4)

    def other_placement(run):
        state = spread(torch.zeros(5, 4), mesh, Replicate())
        run.optimizer.state[run.params[1]]["momentum_buffer"] = state

    mixed = r"\['params'\]\[1\] is a DTensor, its state a Tensor; needed: a DTensor"
    refused(Run(mesh, backend=backend).train(range(1)), TypeError, mixed, whole_state)
    other = Run(mesh, backend=backend)
    other_mesh = init_device_mesh("cpu", (1, 2))

    def grad_of_another_mesh(run):
        run.set_grads = lambda *_: None
        for p in run.params:
            p.grad = distribute_tensor(torch.ones(p.shape), other_mesh, src_data_rank=None)

    refused(other, ValueError, r"\['params'\]\[0\]\.grad is placed as", grad_of_another_mesh)
    saved = Run(other_mesh).train(range(1)).optimizer.state_dict()
    for run in (Run(mesh, backend=backend), Run(None, backend=backend)):
        with pytest.raises(ValueError, match="momentum_buffer of parameter 0 is sharded over"):
            run.optimizer.load_state_dict(saved)
    with pytest.raises(TypeError, match=r"params\[0\] is a DTensor; give its part here"):
        fm.ops.sgd_(run_of(mesh), run_of(mesh), lr=0.1)

    placed = r"\['params'\]\[1\] state is placed as \[Replicate\(\)\]"
    refused(Run(mesh, backend=backend).train(range(1)), ValueError, placed, other_placement)

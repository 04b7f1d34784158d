"""More cases of test_shards.py: gradients and checkpoints that are moved, sums over meshes."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from loop import CLASSICAL, SUBJECTS
from shard_cases import Run, case, random, spread, whole
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter

import fused_momentum as fm


@case(one=((2, 1), [Shard(0), Replicate()]), both=((1, 2), [Shard(0), Shard(1)]))
def sums_go_along_the_sharded_dimensions_of_a_mesh(mesh, shape, placements):
    mesh, found = init_device_mesh("cpu", shape), []
    for place in (partial(distribute_tensor, device_mesh=mesh, placements=placements), torch.clone):
        p = Parameter(place(random((6, 4), 0)))
        p.grad = place(random((6, 4), 1))
        optimizer = fm.FusedSGDSaI([p], **CLASSICAL)
        optimizer.step()
        found.append((whole(p.detach()), optimizer.state[p]["gsnr"]))
    assert all(map(torch.equal, *found))


@case(cpu=("cpu",), reference=("reference",))
def a_gradient_that_is_on_its_way(mesh, backend):
    """After a collective that nobody has waited for."""
    run, twin = Run(mesh, backend=backend), Run(None, backend=backend)
    run.set_grads(0)
    twin.set_grads(0)
    p = run.params[0]
    halves = DTensor.from_local(whole(p.grad) / 2, mesh, [Partial()], run_check=False)
    p.grad = halves.redistribute(placements=p.placements, async_op=True)
    assert type(p.grad._local_tensor) is not torch.Tensor
    run.optimizer.step()
    twin.optimizer.step()
    run.assert_same(twin)


@case(cpu=("cpu",), reference=("reference",))
def a_moved_gradient_that_changes_after_a_failed_step(mesh, backend):
    run, twin = Run(mesh, backend=backend).train(range(1)), Run(None).train(range(1))
    run.set_grads(1)
    twin.set_grads(1, 3.0)
    p, bad = run.params[0], run.params[-1]
    p.grad = DTensor.from_local(whole(p.grad) / 2, mesh, [Partial()], run_check=False)
    good = run.optimizer.state.pop(bad)
    run.optimizer.state[bad] = {"momentum_buffer": spread(torch.ones(3), mesh, Replicate())}
    with pytest.raises(ValueError, match="state has shape"):
        run.optimizer.step()
    run.optimizer.state[bad] = good
    for q in run.params:
        q.grad.to_local().mul_(3.0)
    run.optimizer.step()
    twin.optimizer.step()
    run.assert_same(twin)


@case(cpu=("cpu",), reference=("reference",))
def a_moved_gradient_is_let_go(mesh, backend):
    run = Run(mesh, backend=backend)
    for t in range(2):
        run.set_grads(t)
        p = run.params[0]
        p.grad = DTensor.from_local(whole(p.grad) / 2, mesh, [Partial()], run_check=False)
        grad, p.grad = weakref.ref(p.grad), p.grad
        run.optimizer.step()
        p.grad = None
        gc.collect()
        assert grad() is None, f"step {t}"


@case()
def nothing_is_sent_to_load_a_checkpoint(mesh):
    """What the scales of the first step are is in it, so that the next one sends nothing either."""
    for source in (Run(mesh, fm.FusedSGDSaI), Run(None, fm.FusedSGDSaI)):
        saved = copy.deepcopy(source.train(range(1)).optimizer.state_dict())
        run = Run(mesh, fm.FusedSGDSaI)
        run.set_grads(1)
        with CommDebugMode() as count:
            run.optimizer.load_state_dict(saved)
            run.optimizer.step()
        assert count.get_total_counts() == 0


@case()
def a_checkpoint_that_is_placed_otherwise(mesh):
    saved, run, twin = (Run(where).train(range(1)) for where in (mesh, mesh, None))
    states = copy.deepcopy(saved.optimizer.state_dict())
    for values in states["state"].values():
        for name, tensor in values.items():
            values[name] = tensor.redistribute(placements=[Replicate()])
    run.optimizer.load_state_dict(states)
    run.train(range(1, 2)).assert_same(twin.train(range(1, 2)))


@case()
def what_is_measured_of_a_parameter_of_other_processes(mesh):
    small, here = DeviceMesh("cpu", [0]), mesh.get_rank() == 0
    p = Parameter(distribute_tensor(random((6, 4), 0), small, [Shard(0)], src_data_rank=None))
    p.grad = distribute_tensor(random((6, 4), 1), small, [Shard(0)], src_data_rank=None)
    optimizer = fm.FusedSGDSaI([p], lr=0.1, degenerate="official")
    optimizer.step()
    assert optimizer.state[p]["stage"] == (3 if here else 0)
    assert len(fm.gsnr([p])) == len(fm.gsnr(optimizer)) == here


@case(none=(True,), zeros=(False,))
def zero_grad_beside_flat_gradients(mesh, set_to_none):
    some = (True, False, True, False, True)
    run = Run(mesh, sharded=some, flatten="grads").train(range(1))
    run.optimizer.zero_grad(set_to_none)
    for p, here in zip(run.params, some, strict=True):
        assert (p.grad is None) == (here and set_to_none)
        assert p.grad is None or not whole(p.grad).any()


@case(cpu=("cpu",), reference=("reference",))
def groups_with_settings_of_their_own(mesh, backend):
    """One group measures, the other has nothing to measure."""
    ended = []
    for where in (mesh, None):
        run = Run(where)
        groups = [{"params": run.params[:2], "lr": 0.3}, {"params": run.params[2:]}]
        groups[1]["scale"] = "sqrt_numel"
        run.optimizer = fm.FusedSGDSaI(groups, **CLASSICAL, backend=backend)
        ended.append(run.train())
    ended[0].assert_same(ended[1])


@case(cpu=("cpu",), reference=("reference",))
def what_has_no_elements_is_measured_with_the_others(mesh, backend):
    """In one process, or in both."""
    ended = []
    for where in (mesh, None):
        tensors = [random(shape, 0) for shape in ((1,), (0, 3), (5, 2))]
        place = (lambda t: spread(t, mesh, Shard(0))) if where else torch.clone
        params = [Parameter(place(t)) for t in tensors]
        optimizer = fm.FusedSGDSaI(params, **CLASSICAL, backend=backend)
        for t in range(2):
            for p in params:
                p.grad = place(random(p.shape, 10 + t))
            optimizer.step()
        ended.append([(whole(p.detach()), optimizer.state[p]["gsnr"]) for p in params])
    for sharded, plain in zip(*ended, strict=True):
        assert all(map(torch.equal, sharded, plain))


@case(cpu=("cpu",), reference=("reference",))
def a_checkpoint_of_settings_that_measure_each_step(mesh, backend):
    """Refused at the step, as where no checkpoint was loaded."""
    cls, kwargs = SUBJECTS["autosgm_clipped"]
    saved = copy.deepcopy(Run(None, cls, kwargs).train(range(1)).optimizer.state_dict())
    run = Run(mesh, cls, {"lr": 0.1}, backend=backend)
    run.optimizer.load_state_dict(saved)
    before = [whole(p.detach()).clone() for p in run.params]
    with pytest.raises(TypeError, match=r"\['params'\]\[0\] is a DTensor, .*autosgm"):
        run.train(range(1, 2))
    assert all(torch.equal(whole(p), q) for p, q in zip(run.params, before, strict=True))

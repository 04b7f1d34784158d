"""Sharded parameters (torch's DTensor): a step works on the part that this process holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor: FSDP2's and tensor parallel parameters are."""
    # Whoever has one has imported the module. It takes long, so nobody else should.
    module = sys.modules.get("torch.distributed.tensor")
    dtensor = getattr(module, "DTensor", None)  # not there while the import is under way
    return dtensor is not None and isinstance(tensor, dtensor)


@torch.no_grad()
def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that is here, in the same memory; of one that is not sharded, all."""
    if not is_sharded(tensor):
        return tensor
    part = tensor.to_local()
    return part.wait() if hasattr(part, "wait") else part  # still on its way, after a collective


# Gradients of this step that were brought to their parameter's layout, by the id of what they were:
# (that, what was made of it). Once each, however often a step looks: it takes a collective.
Moved = dict[int, tuple[torch.Tensor, torch.Tensor]]


def parts_of(
    name: str, streams: Sequence[torch.Tensor | None], moved: Moved
) -> list[torch.Tensor | None]:
    """The parts of a parameter, its gradient and its states; no copies, but of a moved gradient.

    A gradient that is laid out otherwise than its parameter (one of tensor parallel may have yet to
    be summed) is brought to it, by a collective.
    """
    param, grad, *states = streams
    for tensor in (grad, *states):
        if tensor is not None and is_sharded(tensor) != is_sharded(param):
            what = "gradient" if tensor is grad else "state"
            raise TypeError(
                f"{name} is a {type(param).__name__}, its {what} a {type(tensor).__name__}; "
                "needed: a DTensor for a DTensor, and for no other"
            )
    if not is_sharded(param):
        return list(streams)
    mesh, placements = param.device_mesh, param.placements
    for what, tensor in [(".grad", grad), *((" state", state) for state in states)]:
        if tensor is None:
            continue
        same = tensor.device_mesh == mesh and (what == ".grad" or tensor.placements == placements)
        if not same:
            raise ValueError(
                f"{name}{what} is placed as {list(tensor.placements)} on {tensor.device_mesh}, its "
                f"parameter as {list(placements)} on {mesh}; they must be the same"
            )
    if grad.placements != placements:
        if id(grad) not in moved:
            with torch.no_grad():
                moved[id(grad)] = grad, grad.redistribute(mesh, placements)
        grad = moved[id(grad)][1]
    return [None if t is None else part_of(t) for t in (param, grad, *states)]


def is_elsewhere(param: torch.Tensor) -> bool:
    """Whether this process is none of those that hold a sharded parameter."""
    return is_sharded(param) and param.device_mesh.get_coordinate() is None


def sharded_dims(param: torch.Tensor) -> tuple[int, ...]:
    """The dimensions of its mesh along which a parameter is sharded; none where it is elsewhere."""
    placements = param.placements if is_sharded(param) and not is_elsewhere(param) else ()
    return tuple(i for i, placement in enumerate(placements) if not placement.is_replicate())


def like(param: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A tensor that is sharded as ``param`` is, whose part here is ``part`` itself."""
    if not is_sharded(param):
        return part
    mesh, spec = param.device_mesh, param._spec
    if part.device.type != mesh.device_type:
        # Parts that FSDP has offloaded: from_local would bring them back.
        meta = type(spec.tensor_meta)(param.shape, param.stride(), part.dtype)
        return type(param.data)(
            part, type(spec)(mesh, param.placements, tensor_meta=meta), requires_grad=False
        )
    return type(param.data).from_local(
        part,
        mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


@torch.no_grad()
def spread(tensor: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, or a sharded one, placed as ``param`` is."""
    if not is_sharded(param):
        return tensor
    if is_sharded(tensor):
        return tensor.redistribute(param.device_mesh, param.placements)
    from torch.distributed.tensor import distribute_tensor

    # None: every process takes its part of what it has, nothing is sent.
    return distribute_tensor(
        tensor.to(param.device), param.device_mesh, param.placements, src_data_rank=None
    )

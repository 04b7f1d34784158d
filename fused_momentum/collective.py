"""What is measured of sharded tensors: sums of each process's parts, which a collective adds up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import reference, shards
from .rules import Rule


def whole_sums(
    params: Sequence[torch.Tensor], updates: Sequence[reference.Update]
) -> list[list[float]]:
    """The sums of ``updates``, each over a parameter's part here, for the whole parameters.

    One collective per mesh, in which all its processes must take part; all get the same bits. Waits
    for the device.
    """
    sums = [update.sums() for update in updates]
    members: dict[tuple, list[int]] = {}
    for i, param in enumerate(params):
        if dims := shards.sharded_dims(param):
            members.setdefault((param.device_mesh, dims), []).append(i)
    for (mesh, dims), indices in members.items():
        device = params[indices[0]].device
        table = torch.tensor([sums[i] for i in indices], dtype=torch.float64, device=device)
        for dim in dims:
            torch.distributed.all_reduce(table, group=mesh.get_group(dim))
        for i, row in zip(indices, table.tolist(), strict=True):
            sums[i] = row
    return sums


@torch.no_grad()
def settle_shards(rule: Rule, walk: Any, grad_multiplier: float, updates: bool) -> list[int]:
    """Measure the sharded tensors of this step, as the kernels see no more than their parts.

    ``updates``: the update follows. Returns the positions of the tensors that begin with it.
    """
    params, found = [], []
    for position in walk.unsettled_shards():
        param, _ = walk.at(position)
        kept, hyper = walk.kept(position)
        part, grad = shards.parts_of("", (param, param.grad))
        states = [None] * len(rule.states)
        update = reference.Update(
            rule, part, grad, states, kept, hyper, grad_multiplier=grad_multiplier
        )
        if update.is_known():
            walk.settle(position, kept)
        else:
            params.append(param)
            found.append((position, kept, update))
    begin = []
    sums = whole_sums(params, [update for *_, update in found])
    for param, (position, kept, update), row in zip(params, found, sums, strict=True):
        first, *_ = update.settle(row, reference.numel_of(param), updates)
        if first:
            begin.append(position)
        if update.is_known():
            walk.settle(position, kept)
    return begin

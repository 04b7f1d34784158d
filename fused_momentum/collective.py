"""What is measured of sharded tensors: sums of each process's parts, which a collective adds up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import reference, shards
from .rules import Rule

Sums = dict[int, list[float]]  # by position in a list of parameters


def whole_sums(rule: Rule, params: Mapping[str, torch.Tensor], parts: Sums) -> Sums:
    """Sums over the whole of some of ``params``, from those over the parts that are here.

    One collective per mesh, in which all its processes must take part; all get the same bits. Waits
    for the device. Raises RuntimeError where they do not measure the same tensors.
    """
    sums = dict(parts)
    members: dict[tuple, list[int]] = {}
    for i, param in enumerate(params.values()):
        if dims := shards.sharded_dims(param):
            members.setdefault((param.device_mesh, dims), []).append(i)
    for (mesh, dims), indices in members.items():
        if not any(i in parts for i in indices):
            continue
        # A row for each tensor of the mesh, and whether it is measured here: alike everywhere.
        absent = [0.0] * (1 + rule.measure.sums)
        rows = [[1.0, *parts[i]] if i in parts else absent for i in indices]
        table = torch.tensor(rows, dtype=torch.float64, device=mesh.device_type)
        for dim in dims:
            torch.distributed.all_reduce(table, group=mesh.get_group(dim))
        processes = math.prod(mesh.size(dim) for dim in dims)
        for i, (count, *row) in zip(indices, table.tolist(), strict=True):
            if count not in (0, processes):
                raise RuntimeError(
                    f"{[*params][i]} is measured by {count:.0f} of {processes} processes in this "
                    "step; all that hold a part of it must have its gradient"
                )
            if i in parts:
                sums[i] = row
    return sums


def settle_shards(
    rule: Rule,
    walk: Any,
    groups: Sequence[dict],
    moved: shards.Moved,
    grad_multiplier: float,
    updates: bool,
) -> list[int]:
    """Measure the sharded tensors of this step, as the kernels see no more than their parts.

    ``updates``: the update follows. Returns the positions of the tensors that begin with it.
    """
    found, parts = {}, {}
    for position in walk.unsettled_shards():
        param, _ = walk.at(position)
        kept, hyper = walk.kept(position)
        if shards.is_elsewhere(param) or reference.is_settled(rule, hyper, kept):
            walk.settle(position, kept)
            continue
        found[position] = param, kept, hyper
        streams = shards.parts_of("", (param, param.grad), moved)
        parts[position] = part_sums(rule, streams, hyper, grad_multiplier)
    params = {
        f"param_groups[{i}]['params'][{k}]": param
        for i, group in enumerate(groups)
        for k, param in enumerate(group["params"])
    }
    begin = []
    for position, sums in whole_sums(rule, params, parts).items():
        param, kept, hyper = found[position]
        first, *_ = reference.settle(rule, hyper, kept, sums, reference.numel_of(param), updates)
        if first:
            begin.append(position)
        if reference.is_settled(rule, hyper, kept):
            walk.settle(position, kept)
    return begin


@torch.no_grad()
def part_sums(
    rule: Rule, streams: Sequence[torch.Tensor], hyper: Sequence[float], grad_multiplier: float
) -> list[float]:
    """The sums of a rule that measures the gradient alone, over one parameter and gradient."""
    absent = [None] * len(rule.states), [None] * len(rule.kept)
    update = reference.Update(rule, *streams, *absent, hyper, grad_multiplier=grad_multiplier)
    return update.sums()

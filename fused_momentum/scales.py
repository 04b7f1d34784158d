"""A look at the scales of SGD-SaI: one number per tensor, beside the root of its size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from . import collective, reference, shards
from .checks import check_is_there, check_param, check_tensor
from .rules import RULES

RULE = RULES["sgd_sai"]


class Scale(NamedTuple):
    """The scale of one tensor, and how many elements (real numbers) that has."""

    gsnr: float
    numel: int

    @property
    def ratio(self) -> float:
        """The scale over the square root of ``numel``: 1 where the gradient decides nothing."""
        return self.gsnr / math.sqrt(self.numel) if self.numel else math.nan


class Scales(dict[str, Scale]):
    """Scales by the name of their parameter; printed as a table."""

    def __repr__(self) -> str:
        rows = [("", "numel", "sqrt(numel)", "gsnr", "ratio")]
        for name, scale in self.items():
            numbers = (math.sqrt(scale.numel), scale.gsnr, scale.ratio)
            rows.append((name, str(scale.numel), *(f"{number:.4g}" for number in numbers)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                [name.ljust(widths[0])]
                + [n.rjust(width) for n, width in zip(numbers, widths[1:], strict=True)]
            )
            for name, *numbers in rows
        )


Named = Iterable[tuple[str, torch.Tensor]]


def gsnr(
    params: torch.nn.Module | torch.optim.Optimizer | Mapping | Iterable, eps: float = 1e-8
) -> Scales:
    """Return the scale of every tensor with a gradient: |g| / (std(g) + eps), by name.

    This is the G of ``FusedSGDSaI`` with ``degenerate="official"``, so that a gradient of zeros
    (0), a constant one and one of one element (|g| / eps) show. The numbers are Python's: reading
    them waits for the device. Sharded parameters (DTensor) are measured whole, by all processes
    that hold a part; those of other processes are left out. Nothing is changed.

    Args:
        params: a model, its ``named_parameters()``, a dict of parameters by name, or parameters
            alone, which are called "0", "1", ...; or an optimizer: then the scales are those that
            it keeps in ``state[p]["gsnr"]``, and nothing is measured.
        eps: as in ``FusedSGDSaI``.

    Raises:
        TypeError, RuntimeError: a parameter or gradient that cannot be measured; it is named.

    Source: Xu et al. (2024), arXiv 2412.11768, algorithm 1.

    Example:
        >>> import torch, fused_momentum
        >>> model = torch.nn.Linear(4, 3)
        >>> model.weight.grad = torch.tensor([[1.0, -1.0, 1.0, -1.0]] * 3)
        >>> model.bias.grad = torch.tensor([3.0, 4.0, 5.0])
        >>> fused_momentum.gsnr(model)
                numel  sqrt(numel)   gsnr   ratio
        weight     12        3.464  3.317  0.9574
        bias        3        1.732  7.071   4.082
        >>> fused_momentum.gsnr(model)["bias"].ratio > 4
        True
    """
    if isinstance(params, torch.optim.Optimizer):
        return Scales(_kept(params))
    return Scales(_measured(dict(_named(params)), eps))


def _named(params: torch.nn.Module | Mapping | Iterable) -> Named:
    if isinstance(params, torch.nn.Module):
        return params.named_parameters()
    if isinstance(params, Mapping):
        return params.items()
    params = [params] if isinstance(params, torch.Tensor) else params
    return [p if isinstance(p, tuple) else (str(i), p) for i, p in enumerate(params)]


def _kept(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Scale]]:
    for i, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"{i}.{k}" for k in range(len(group["params"]))]
        for name, p in zip(names, group["params"], strict=True):
            scale = optimizer.state.get(p, {}).get("gsnr")
            if scale is not None and not shards.is_elsewhere(p):
                yield name, Scale(float(scale), reference.numel_of(p))


@torch.no_grad()
def _measured(named: dict[str, torch.Tensor], eps: float) -> Iterator[tuple[str, Scale]]:
    hyper = dict.fromkeys(RULE.hyper, 0.0)
    hyper["eps"] = eps
    hyper["degenerate"] = RULE.choices["degenerate"].index("official")
    parts = {}
    for i, (name, param) in enumerate(named.items()):
        if (isinstance(param, torch.Tensor) and param.grad is None) or shards.is_elsewhere(param):
            continue
        part = shards.part_of(param)
        check_param(name, part)
        part, grad = shards.parts_of(name, (param, param.grad), {})
        check_tensor(f"{name}.grad", grad, part)
        check_is_there(f"{name}.grad", grad)
        parts[i] = collective.part_sums(RULE, (part, grad), list(hyper.values()), 1.0)
    names, params = list(named), list(named.values())
    for i, sums in collective.whole_sums(RULE, named, parts).items():
        scale = torch.zeros((), dtype=torch.float64, device="cpu")
        kept = [scale if number.name == "gsnr" else None for number in RULE.kept]
        numel = reference.numel_of(params[i])
        reference.settle(RULE, list(hyper.values()), kept, sums, numel, updates=True)
        yield names[i], Scale(scale.item(), numel)

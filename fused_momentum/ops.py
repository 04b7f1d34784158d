"""Functional ops over lists of tensors, registered with torch.

A rule whose step is one elementwise pass has an op that works in place, ``fm.ops.<rule>_(params,
grads, *states, ...)``, and one that returns new tensors, ``fm.ops.<rule>(...)``. The tensors may be
slices ``flat[start:end]`` of flat buffers: nothing is copied, so a caller can run the optimizer
layer by layer.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import native, reference, shards
from .backends import choose
from .checks import check_is_there, check_param, check_tensor
from .rules import RULES, Rule

_library = torch.library.Library("fused_momentum", "DEF")


def _schema(rule: Rule, in_place: bool) -> str:
    def mark(alias: str) -> str:
        return f"Tensor({alias}!)[]" if in_place else "Tensor[]"

    tensors = [f"{mark('a')} params", "Tensor[] grads"]
    tensors += [f"{mark(chr(ord('b') + i))} {s.name}s" for i, s in enumerate(rule.states)]
    numbers = [f"float {key}" for key in rule.hyper]
    returns = "()" if in_place else f"({', '.join(['Tensor[]'] * (1 + len(rule.states)))})"
    name = rule.name + ("_" if in_place else "")
    arguments = [*tensors, "*", *numbers, "bool first", "bool maximize"]
    return f"{name}({', '.join(arguments)}) -> {returns}"


def _names(rule: Rule) -> list[str]:
    return ["params", "grads", *(f"{s.name}s" for s in rule.states)]


def _check_lists(rule: Rule, lists: Sequence[Sequence[torch.Tensor]]) -> None:
    names = _names(rule)
    optional = [False, False, *(s.when is not None for s in rule.states)]
    for name, tensors, may_lack in zip(names, lists, optional, strict=True):
        if len(tensors) != len(lists[0]) and not (may_lack and not tensors):
            raise ValueError(f"{name} has {len(tensors)} tensors, params {len(lists[0])}")
        for i, tensor in enumerate(tensors):
            check_tensor(f"{name}[{i}]", tensor, lists[0][i])


def _check_memory(rule: Rule, lists: Sequence[Sequence[torch.Tensor]]) -> None:
    """Of what is traced there is none."""
    for name, tensors in zip(_names(rule), lists, strict=True):
        for i, tensor in enumerate(tensors):
            check_is_there(f"{name}[{i}]", tensor)


def _span(tensor: torch.Tensor) -> tuple[str, int, int]:
    """Kind of device, first address and the one after the last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return tensor.device.type, begin, begin + (last + 1) * tensor.element_size()


def _check_overlap(rule: Rule, lists: Sequence[Sequence[torch.Tensor]]) -> None:
    """Raise where the addresses of what is written reach into another tensor's."""
    spans = []
    for name, tensors in zip(_names(rule), lists, strict=True):
        for i, tensor in enumerate(tensors):
            own_grad = name == "grads" and _span(tensor) == _span(lists[0][i])
            if tensor.numel() and not own_grad:
                spans.append((*_span(tensor), name != "grads", f"{name}[{i}]"))
    furthest: dict[tuple[str, bool], tuple[int, str]] = {}  # by device and whether it is written
    for device, begin, end, written, name in sorted(spans):
        for other_written in (True, False):
            reach, other = furthest.get((device, other_written), (0, ""))
            if (written or other_written) and begin < reach:
                raise ValueError(
                    f"{other} and {name} overlap in memory; what is written must have its own"
                )
        furthest[device, written] = max((end, name), furthest.get((device, written), (0, "")))


def _run_native(rule: Rule, streams, hyper: Sequence[float], multiplier: float, first: bool):
    # Where tensors are on a GPU, the extension asks for the stream.
    cuda = streams[0][0].device.type == "cuda"
    stream = torch._C._cuda_getCurrentRawStream if cuda else None
    number, ones = native.rule_number(rule.name), [float(first)] * len(streams[0])
    native.load()[0].run_tensors(number, streams, hyper, multiplier, ones, stream)


# Their tables are read at each replay of a CUDA graph.
_launchers_of_graphs = []


def _run_triton(rule: Rule, streams, hyper: Sequence[float], multiplier: float, first: bool):
    from . import kernels

    scalars = [float(first), *(0.0 for _ in rule.tensor_scalars[1:])]
    items = [kernels.Item(of, 0, scalars) for of in _by_tensor(streams)]
    # Its tables are those of one call: the next may be on another stream.
    launcher = kernels.Launcher(rule)
    table = torch.tensor([[*hyper, multiplier]], dtype=torch.float64, device="cpu")
    launcher.run(kernels.batches(items), table)
    if launcher.is_in_graphs:
        _launchers_of_graphs.append(launcher)


def _run_reference(rule: Rule, streams, hyper: Sequence[float], multiplier: float, first: bool):
    for param, grad, *states in _by_tensor(streams):
        reference.update(rule, param, grad, states, hyper, grad_multiplier=multiplier, first=first)


_RUNS = {
    "cpu": _run_native,
    "cuda": _run_native,
    "triton": _run_triton,
    "reference": _run_reference,
}


def _by_tensor(streams) -> Iterator[tuple]:
    """The streams of each tensor; None where a state is absent."""
    absent = [None] * len(streams[0])
    return zip(*(tensors or absent for tensors in streams), strict=True)


@torch.no_grad()
def _update(rule: Rule, lists, hyper: Sequence[float], first: bool, maximize: bool) -> None:
    """One launch for each device and, on GPUs, combination of dtypes."""
    for k, name in enumerate(["params", *(f"{s.name}s" for s in rule.states)]):
        for i, tensor in enumerate(lists[k and k + 1]):
            check_param(f"{name}[{i}]", tensor)
    by_device: dict[torch.device, list[int]] = {}
    for i, param in enumerate(lists[0]):
        by_device.setdefault(param.device, []).append(i)
    for device, indices in by_device.items():
        streams = [[tensors[i] for i in indices] if tensors else [] for tensors in lists]
        run = _RUNS[choose("auto", device.type).name]
        run(rule, streams, hyper, -1.0 if maximize else 1.0, first)
        if run is not _run_reference:  # torch has counted the reference's
            torch.autograd.graph.increment_version(itertools.chain(streams[0], *streams[2:]))


def _register(rule: Rule) -> tuple[Callable, Callable]:
    """Register both ops of a rule and return their Python functions."""
    _library.define(_schema(rule, in_place=True))
    _library.define(_schema(rule, in_place=False))

    def update(lists, numbers):
        for state, tensors in zip(rule.states, lists[2:], strict=True):
            if state.when and numbers[state.when] != 0 and len(tensors) != len(lists[0]):
                raise ValueError(
                    f"{state.name}s has {len(tensors)} tensors, params {len(lists[0])}; needed "
                    f"where {state.when} is not 0"
                )
        hyper = [float(numbers[key]) for key in rule.hyper]
        _update(rule, lists, hyper, numbers["first"], numbers["maximize"])

    def in_place(*lists, **numbers):
        _check_lists(rule, lists)
        _check_memory(rule, lists)
        _check_overlap(rule, lists)
        update(lists, numbers)

    @torch.no_grad()
    def functional(*lists, **numbers):
        _check_lists(rule, lists)
        _check_memory(rule, lists)
        written = [[t.clone() for t in tensors] for tensors in (lists[0], *lists[2:])]
        update([written[0], lists[1], *written[1:]], numbers)
        return tuple(written)

    def fake_in_place(*lists, **numbers):
        _check_lists(rule, lists)

    def fake(*lists, **numbers):
        _check_lists(rule, lists)
        return tuple([torch.empty_like(t) for t in tensors] for tensors in (lists[0], *lists[2:]))

    made = []
    for name, impl, fake_impl in (
        (f"{rule.name}_", in_place, fake_in_place),
        (rule.name, functional, fake),
    ):
        _library.impl(name, impl, "CompositeExplicitAutograd")
        # No gradient flows through an update, so what is returned has no history.
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"fused_momentum::{name}", fake_impl, lib=_library)
        made.append(_function(rule, name))
    return tuple(made)


def _function(rule: Rule, name: str) -> Callable:
    """The Python function of an op: hyper-parameters by name, zero where they are not given."""
    op = getattr(torch.ops.fused_momentum, name).default
    positional = _names(rule)
    kinds = inspect.Parameter
    parameters = [kinds(n, kinds.POSITIONAL_OR_KEYWORD) for n in positional]
    for state, i in zip(rule.states, range(2, len(positional)), strict=True):
        if state.when is not None:
            parameters[i] = parameters[i].replace(default=())
    for key in rule.hyper:
        default = kinds.empty if key == "lr" else 0.0
        parameters.append(kinds(key, kinds.KEYWORD_ONLY, default=default))
    for key in ("first", "maximize"):
        parameters.append(kinds(key, kinds.KEYWORD_ONLY, default=False))
    signature = inspect.Signature(parameters)

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for list_name, tensors in zip(positional, bound.args, strict=False):
            if isinstance(tensors, torch.Tensor):
                raise TypeError(f"{list_name} is a tensor; needed: a list of tensors")
            for i, tensor in enumerate(tensors):
                if shards.is_sharded(tensor):
                    raise TypeError(
                        f"{list_name}[{i}] is a DTensor; give its part here, tensor.to_local()"
                    )
        return op(*(list(tensors) for tensors in bound.args), **bound.kwargs)

    function.__name__ = function.__qualname__ = name
    function.__module__ = __name__
    function.__signature__ = signature
    how = "Update in place" if name.endswith("_") else "Return updated params and states"
    function.__doc__ = (
        f"{how}: ``{rule.formula}``.\n\nLists of tensors of equal length; one shape, device and "
        "kind (real or complex) per index; those that are written must not overlap. ``first``: "
        "this is their first step. Gradients are never modified. Raises ValueError or TypeError, "
        f"naming the tensor, before anything is changed.\n\nSource: {rule.source}."
    )
    return function


# A rule with numbers per tensor, or that counts steps, needs an optimizer to keep them.
_RULES = [rule for rule in RULES.values() if not (rule.kept or rule.read)]
for _rule in _RULES:
    globals()[f"{_rule.name}_"], globals()[_rule.name] = _register(_rule)

if TYPE_CHECKING:  # the functions above are made from the table: checkers do not see them

    def __getattr__(name: str) -> Callable[..., Any]: ...


__all__ = [name for rule in _RULES for name in (rule.name, f"{rule.name}_")]

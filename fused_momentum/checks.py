"""What may take part in a step, and the error for what may not; as csrc/plan.cpp, describe.cpp."""

from __future__ import annotations

import torch

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)
SPARSE = (
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)


def check_tensor(name: str, tensor: torch.Tensor, param: torch.Tensor) -> None:
    """Raise where a tensor cannot take part in the update of ``param``; as csrc/describe.cpp."""
    if tensor.layout in SPARSE:
        raise RuntimeError(
            f"{name} is sparse; sparse gradients are not supported (make it dense with .to_dense())"
        )
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; these are not supported (optimize the dense parameters "
            "behind it)"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; needed: torch.strided")
    if tensor.device != param.device:
        raise ValueError(
            f"{name} is on device {tensor.device}, its parameter on {param.device}; "
            "both must be on the same device"
        )
    if tensor.shape != param.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, its parameter {list(param.shape)}; "
            "they must be the same"
        )
    if tensor.is_complex() != param.is_complex():
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, its parameter {param.dtype}; "
            "both must be real or both complex"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; needed: {', '.join(map(str, DTYPES))}")


def check_is_tensor(name: str, param: object) -> None:
    """Raise where ``param`` is none; as csrc/groups.cpp."""
    if not isinstance(param, torch.Tensor):
        raise TypeError(f"{name} is a {type(param).__name__}; needed: a tensor")


def check_param(name: str, param: object) -> None:
    """Raise where ``param`` cannot be updated; as csrc/plan.cpp and csrc/describe.cpp."""
    check_is_tensor(name, param)
    check_tensor(name, param, param)
    if torch._C._dispatch_keys(param).has(torch._C.DispatchKey.Python):
        raise TypeError(
            f"{name} is a tensor subclass without storage of its own; needed: a plain tensor, or "
            "DTensors for a parameter and its gradient"
        )
    if param.is_conj() or param.is_neg():
        raise TypeError(
            f"{name} is a lazily conjugated or negated view; resolve it with "
            ".resolve_conj().resolve_neg()"
        )
    check_memory(name, param, param, written=True)


def check_number(name: str, key: str, number: object, dtype: str, device: torch.device) -> None:
    """Raise where a number cannot be kept under ``key``; as csrc/describe.cpp."""
    wanted = getattr(torch, dtype)
    if not (
        isinstance(number, torch.Tensor)
        and number.layout == torch.strided
        and number.numel() == 1
        and number.dtype == wanted
        and number.device == device
    ):
        raise TypeError(
            f"{name}: its state {key!r} must be a {wanted} tensor of one element on {device}"
        )
    check_is_there(f"{name}: its state {key!r}", number)


def check_is_there(name: str, tensor: torch.Tensor) -> None:
    """Raise where a tensor's memory has been given back; as csrc/describe.cpp."""
    if tensor.numel() and not tensor.is_meta and tensor.untyped_storage().data_ptr() == 0:
        raise RuntimeError(f"{name} has no memory: its storage has been given back")


def check_memory(name: str, tensor: torch.Tensor, param: torch.Tensor, *, written: bool) -> None:
    """Raise where a tensor's memory is not there, or not its own; as csrc/describe.cpp."""
    if tensor.numel() == 0 or tensor.is_meta:
        return
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    if written and any(size > 1 and stride == 0 for size, stride in dims):
        raise RuntimeError(
            f"{name} has elements that share memory (an expanded tensor); give it memory of its own"
        )
    if tensor is not param and _overlap_in_part(tensor, param):
        raise RuntimeError(
            f"{name} shares a part of its parameter's memory; give it memory of its own"
        )
    check_is_there(name, tensor)


def _overlap_in_part(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two dense tensors do, or lie in the same memory in another order."""
    spans = []
    for t in (a, b):
        elements = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        if elements != t.numel():
            return False
        spans.append((t.data_ptr(), t.data_ptr() + elements * t.element_size()))
    (begin, end), (other_begin, other_end) = spans
    same = spans[0] == spans[1] and a.stride() == b.stride()
    return begin < other_end and other_begin < end and not same


# Keys that the groups of torch.optim.SGD, and of its checkpoints, do not have: absent is False.
OPTIONAL_KEYS = ("capturable", "decoupled_weight_decay")


def number_of(group: dict, key: str, choices: tuple[str, ...] = ()) -> float:
    """The value of a hyper-parameter, or the number of its choice; as csrc/rows.cpp."""
    if key not in group:
        if key in OPTIONAL_KEYS:
            return 0.0
        raise KeyError(f"param_groups: key {key!r} is missing")
    value = group[key]
    if choices:
        if value not in choices:
            raise ValueError(f"param_groups: {key}={value!r} is not one of {list(choices)}")
        return float(choices.index(value))
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"param_groups: {key} is a {type(value).__name__}; needed: a number or a tensor with "
            "one element"
        ) from error

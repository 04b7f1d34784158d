"""What the classes are given: checks, and the keywords that they share."""

from __future__ import annotations

from typing import Any

import torch

STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_options(params: Any, flatten: bool | str, state_dtype: torch.dtype | None) -> None:
    """Raise where one of these, which no group has, is none of what it may be."""
    if isinstance(params, torch.nn.Module):
        name = type(params).__name__
        raise TypeError(f"params is a {name}; needed: its parameters, model.parameters()")
    if flatten not in (False, True, "grads"):
        raise ValueError(f"flatten={flatten!r} is not one of False, True, 'grads'")
    if state_dtype not in (None, *STATE_DTYPES):
        names = ", ".join(map(str, STATE_DTYPES))
        raise ValueError(f"state_dtype={state_dtype!r} is not one of None, {names}")


def check_lr(lr: float | torch.Tensor) -> None:
    """Raise where ``lr`` is not one number of 0 or more."""
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not is_not_negative("lr", lr):
        raise ValueError(f"Invalid learning rate: {lr}")


def is_not_negative(name: str, value: Any) -> bool:
    """Whether a hyper-parameter is 0 or more; TypeError where it is no number."""
    try:
        return bool(value >= 0.0)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"{name} is {value!r} ({type(value).__name__}); needed: a number or a tensor with one "
            "element"
        ) from error


def check_no_torch_form(name: str, group: dict[str, Any]) -> None:
    """Raise where a class that has neither is given dampening or nesterov."""
    if group["dampening"] != 0 or group["nesterov"]:
        raise ValueError(
            f"{name} has no dampening and no nesterov switch; given: "
            f"dampening={group['dampening']}, nesterov={group['nesterov']}"
        )


def sgd_keywords(
    maximize: bool,
    foreach: bool | None,
    differentiable: bool,
    fused: bool | None,
    *,
    capturable: bool,
    decoupled_weight_decay: bool = False,
) -> dict[str, Any]:
    """The keywords that say how, not what, as keys of a group.

    Those that torch.optim.SGD lacks are keys only where they are set: its checkpoints have no such
    key, and torch.distributed.checkpoint asks for all that a group has.
    """
    ours = {"capturable": capturable, "decoupled_weight_decay": decoupled_weight_decay}
    return {
        "maximize": maximize,
        "foreach": foreach,
        "differentiable": differentiable,
        "fused": fused,
        **{key: value for key, value in ours.items() if value},
    }

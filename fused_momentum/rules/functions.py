"""What a rule may call besides ``+ - *``: each is rounded once, and alike everywhere.

Written for tensors, which the reference computes on, and for Python's floats, in which scalars are
derived. The Triton kernels put functions of the same names in their place (``kernels/rules.py``);
in C++ they are ``sqrt``, ``/``, ``fabs``, ``? :`` and a cast to double.
"""

from __future__ import annotations

import math

import torch


def sqrt(x):
    """Square root, rounded to nearest; NaN below zero."""
    if not isinstance(x, torch.Tensor):
        return math.sqrt(x) if x >= 0.0 else math.nan
    if x.is_cuda:
        return x.sqrt()
    # torch's own root on a CPU is not rounded to nearest. An error in the last bit of a float64
    # never reaches a float32; float64 takes NumPy's, or Python's where there is none.
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    try:
        import numpy
    except ImportError:
        return torch.tensor([sqrt(v) for v in x.flatten().tolist()], dtype=x.dtype).view(x.shape)
    with numpy.errstate(invalid="ignore"):
        return torch.as_tensor(numpy.sqrt(x.numpy()))


def div(x, y):
    """Quotient, rounded to nearest; infinite or NaN where y is zero."""
    if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor):
        # Of a number torch would multiply by the reciprocal on a GPU.
        like = x if isinstance(x, torch.Tensor) else y
        return x / torch.as_tensor(y, dtype=like.dtype, device=like.device)
    if y != 0.0:
        return x / y
    return math.nan if x == 0.0 or x != x else math.copysign(math.inf, x) * math.copysign(1.0, y)


def absolute(x):
    """The magnitude of x."""
    return abs(x)


def where(condition, x, y):
    """x where the condition holds, else y; of tensors, one at least is a tensor."""
    if isinstance(condition, torch.Tensor):
        if not (isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor)):
            # torch would make them float32, also in a rule that computes in float64.
            raise TypeError(f"where(condition, {x}, {y}): two numbers have no dtype; give a tensor")
        return torch.where(condition, x, y)
    return x if condition else y


def widen(x):
    """x as float64."""
    return x.double() if isinstance(x, torch.Tensor) else x

"""The rules as Triton functions: the same code, with Triton's functions in place of ``functions``.

Each of these rounds once, to nearest, on every device and in Triton's interpreter.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import triton
import triton.language as tl

from ..rules import functions


@triton.jit
def sqrt(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)  # tl.sqrt is an approximation
    else:
        return tl.sqrt(x)


@triton.jit
def div(x, y):
    if isinstance(x, tl.tensor):
        y = number(y, x.dtype)
    else:
        x = number(x, y.dtype)
    if (x.dtype == tl.float32) & (y.dtype == tl.float32):
        return tl.div_rn(x, y)  # x / y is an approximation
    else:
        return x / y


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def widen(x):
    return x.to(tl.float64)


@triton.jit
def where_fp32(condition, x, y):
    return select(condition, x, y, tl.float32)


@triton.jit
def where_fp64(condition, x, y):
    return select(condition, x, y, tl.float64)


@triton.jit
def select(condition, x, y, DTYPE: tl.constexpr):
    """tl.where; two literals are of type DTYPE."""
    if isinstance(x, tl.tensor) | isinstance(y, tl.tensor):
        return tl.where(condition, x, y)
    else:
        return tl.where(condition, number(x, DTYPE), number(y, DTYPE))


@triton.jit
def number(x, DTYPE: tl.constexpr):
    """A literal as a tensor of type DTYPE, to which Triton would round it by way of float32."""
    if isinstance(x, tl.tensor):
        return x
    else:
        return tl.full((), x, DTYPE)


_TWINS = {getattr(functions, f.fn.__name__): f for f in (sqrt, div, absolute, widen)}
_WHERE = {tl.float32: where_fp32, tl.float64: where_fp64}


@functools.cache
def twin(function: Callable, dtype: tl.dtype) -> triton.JITFunction:
    """A rule's function, and all that it calls, for Triton; ``dtype`` is what it computes in.

    That is float64 where numbers are derived or settled, else the type of the update.
    """
    if function is functions.where:
        return _WHERE[dtype]
    if function in _TWINS:
        return _TWINS[function]
    names = {}
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, types.FunctionType):
            names[name] = twin(value, dtype)
        elif isinstance(value, (int, float)):
            names[name] = tl.constexpr(value)
    # Triton's interpreter looks for its language among the globals of a function.
    scope = {**function.__globals__, "tl": tl, **names}
    made = types.FunctionType(function.__code__, scope, function.__name__)
    # Triton tells the functions of a kernel apart by their names and the types of their arguments.
    made.__qualname__ = f"{function.__qualname__}_{dtype}"
    return triton.jit(made)

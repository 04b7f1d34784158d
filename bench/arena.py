"""The parameters and gradients that providers step on, and what the gate compares of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLED = 2**14  # elements of a tensor that are compared where the update is elementwise
WHOLE = 2**20  # elements of the largest tensors that are compared where it is not
FILLERS, MOST_FILLERS = 1000, 100_000  # tensors at a time that fill holes in the heap, and in all
OBJECTS, PAGE = 600, 4096  # bytes: what a tensor takes besides its elements, at most


@dataclass
class Arena:
    """Parameters and gradients of one case and dtype, shared by all providers.

    Only the states are a provider's own, so a case needs little memory and every provider works on
    the same pages. `grads` are constant: no provider may change them.
    """

    dtype: torch.dtype
    params: list[Tensor]
    grads: list[Tensor]
    seed: int

    def fill(self) -> None:
        """Bring the parameters to their first values, with |p| < 0.1, and give them gradients."""
        _randomize(self.params, 0.1, self.seed)
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def is_complete(self) -> bool:
        """Whether every parameter still has its gradient: a step without them is a fast one."""
        return all(p.grad is g for p, g in zip(self.params, self.grads, strict=True))

    @property
    def bytes(self) -> int:
        """Bytes of the parameters and the gradients."""
        return sum(t.nbytes for t in (*self.params, *self.grads))


def build(shapes, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Arena:
    """Random parameters (|p| < 0.1) and gradients (|g| < 0.02), each its own allocation.

    Sizes as in training, and chosen so that three steps move a parameter by far more than one
    bf16 rounding: an update that does nothing cannot pass the gate.
    """
    smallest = min(map(math.prod, shapes))
    fillers = _fill_holes(min(smallest, FILLERS), dtype) if device.type == "cpu" else []
    params, grads = ([torch.empty(s, dtype=dtype, device=device) for s in shapes] for _ in "pg")
    del fillers
    arena = Arena(dtype, params, grads, seed)
    _randomize(grads, 0.02, seed + 1)
    arena.fill()
    return arena


def _fill_holes(elements: int, dtype: torch.dtype) -> list[Tensor]:
    """Small tensors in the holes that earlier work has left in the heap; those after lie together.

    So they do in a process that begins with its model. Scattered over thousands of pages they make
    a step wait for the addresses of pages, and smaller ones more often.
    """
    fillers: list[Tensor] = []
    while len(fillers) < MOST_FILLERS:
        more = [torch.empty(elements, dtype=dtype) for _ in range(FILLERS)]
        fillers += more
        pages = {tensor.data_ptr() // PAGE for tensor in more}
        if len(pages) * PAGE < FILLERS * (more[0].nbytes + OBJECTS):
            break
    return fillers


def _randomize(tensors: list[Tensor], scale: float, seed: int) -> None:
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.uniform_(-scale, scale, generator=generator)


def compared(tensors: list[Tensor], whole: bool) -> list[Tensor]:
    """Copies of what the gate compares.

    Where the update of an element depends on nothing but that element, about `SAMPLED` elements of
    each tensor: a step over the samples is then the step over the tensors, seen at those elements.
    Else (`whole`) the tensors of at most `WHOLE` elements, or the smallest one.
    """
    if not whole:
        return [_sample(tensor) for tensor in tensors]
    small = [tensor for tensor in tensors if tensor.numel() <= WHOLE]
    return [t.detach().clone() for t in small or [min(tensors, key=Tensor.numel)]]


def _sample(tensor: Tensor) -> Tensor:
    """Some elements, the last one among them.

    The stride is odd, so that every lane of a vector and every place in a tile occurs.
    """
    flat = tensor.detach().flatten()
    stride = flat.numel() // SAMPLED | 1
    return torch.cat([flat[::stride], flat[-1:]])

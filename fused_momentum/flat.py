"""Flat buffers: many tensors as views of one piece of memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

ALIGNMENT = 128  # bytes: a cache line of a GPU, two of a CPU, and whole 16-byte loads


def _dense_strides(like: torch.Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor that visits its elements in the order of ``like``'s memory."""
    return torch.empty_like(like, device="meta", memory_format=torch.preserve_format).stride()


Shapes = Sequence[tuple[Sequence[int], Sequence[int]]]  # (size, stride) of each tensor


def allocate(
    shapes: Shapes,
    dtype: torch.dtype,
    device: torch.device | str | None,
    own_storage: bool,
    alignment: int = ALIGNMENT,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a new flat buffer of zeros, and one tensor per ``(size, stride)`` in it.

    They are views of the buffer; with ``own_storage`` each has a storage of its own, a slice of the
    buffer's, so that saving, pickling or copying one of them does not drag the others along.
    """
    alignment = max(alignment // dtype.itemsize, 1)
    starts, total = [], 0
    for size, _ in shapes:
        starts.append(total)
        total += -(-torch.Size(size).numel() // alignment) * alignment
    buffer = torch.zeros(total, dtype=dtype, device=device)
    view = slice_of if own_storage else torch.as_strided
    return buffer, [
        view(buffer, size, stride, start)
        for (size, stride), start in zip(shapes, starts, strict=True)
    ]


def slice_of(
    buffer: torch.Tensor, size: Sequence[int], stride: Sequence[int], start: int
) -> torch.Tensor:
    """A tensor over ``buffer``'s memory from element ``start`` on, with a storage of its own."""
    itemsize = buffer.dtype.itemsize
    end = start + torch.Size(size).numel()
    storage = buffer.untyped_storage()[start * itemsize : end * itemsize]
    return torch.empty(0, dtype=buffer.dtype, device=buffer.device).set_(storage, 0, size, stride)


def numbers(
    count: int, dtype: torch.dtype, device: torch.device | str | None, value: float
) -> list[torch.Tensor]:
    """Return 0-dim tensors of a value, side by side in one flat buffer, each with own storage."""
    buffer, tensors = allocate([((), ())] * count, dtype, device, own_storage=True, alignment=0)
    buffer.fill_(value)
    return tensors


def zeros_like(
    tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], own_storage: bool = False
) -> list[torch.Tensor]:
    """Return a zero tensor per tensor, of its shape and memory order and the given dtype.

    All tensors of one device and dtype lie in one flat buffer (``own_storage``: see ``allocate``).
    """
    made: list[torch.Tensor | None] = [None] * len(tensors)
    for _, slots in _allocate_like(tensors, dtypes, own_storage):
        for i, view in slots:
            made[i] = view
    return made


def _allocate_like(tensors, dtypes, own_storage):
    """Per device and dtype a flat buffer, and ``(index, tensor)`` for each tensor in it."""
    members: dict[tuple, list[int]] = {}
    for i, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        members.setdefault((tensor.device, dtype), []).append(i)
    for (device, dtype), indices in members.items():
        shapes = [(tensors[i].shape, _dense_strides(tensors[i])) for i in indices]
        buffer, views = allocate(shapes, dtype, device, own_storage)
        yield buffer, list(zip(indices, views, strict=True))


def initialize_velocities(
    param_shapes: Iterable[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> list[torch.Tensor]:
    """Return one zero tensor per shape, all contiguous views of one flat buffer.

    Example:
        >>> import fused_momentum
        >>> weight, bias = fused_momentum.initialize_velocities([(2, 3), (3,)])
        >>> weight.shape, bias.shape
        (torch.Size([2, 3]), torch.Size([3]))
        >>> weight.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()
        True
    """
    meta = [torch.empty(torch.Size(shape), device="meta") for shape in param_shapes]
    return allocate([(m.shape, m.stride()) for m in meta], dtype, device, own_storage=False)[1]


def initialize_velocities_from_params(params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return one zero tensor per parameter, of its shape, dtype, device and memory order.

    All tensors of one device and dtype are views of one flat buffer.
    """
    params = list(params)
    return zeros_like(params, [p.dtype for p in params])


class Home:
    """Flat buffers that parameters (or their gradients) live in, and at which addresses."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []
        self._attribute = "data"
        self._address: dict[int, int] = {}

    @classmethod
    @torch.no_grad()
    def of(cls, params: Sequence[torch.Tensor], attribute: str) -> Home:
        """Move every ``param.<attribute>`` ("data" or "grad") into new buffers."""
        home = cls()
        home._attribute = attribute
        tensors = [getattr(p, attribute) for p in params]
        for buffer, slots in _allocate_like(tensors, [t.dtype for t in tensors], True):
            home.buffers.append(buffer)
            for i, slot in slots:
                setattr(params[i], attribute, slot.copy_(tensors[i]))
                home._address[id(params[i])] = slot.data_ptr()
        return home

    def holds(self, params: Iterable[torch.Tensor]) -> bool:
        """Whether every one of these still lives at its address here."""
        return all(
            self._address.get(id(p)) == getattr(p, self._attribute).data_ptr() for p in params
        )

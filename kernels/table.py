"""The tensors of one launch, as tables on the device that are uploaded only when they changed."""

from __future__ import annotations

import torch

from ..graphs import is_capturing
from .sums import TILE


def pinned(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The table where the device can copy it from while the host goes on."""
    return table if device.type == "cpu" else table.pin_memory()


class Table:
    """The tensors of one launch; all of them have the same ``dtypes``: of p, g and the states.

    A table that is set again with the same content is not uploaded again. Uploads are ordered by
    the current stream and do not wait for it. Tables that a captured CUDA graph reads are never
    changed or freed.
    """

    def __init__(self, device: torch.device, dtypes: tuple[torch.dtype, ...]):
        self.device = device
        self.dtypes = dtypes
        self.tensors = self.tiles = self.dims = 0
        self._host: dict[str, torch.Tensor] = {}
        self._device: dict[str, torch.Tensor] = {}
        self._in_graphs: set[str] = set()  # of `_device`, those that a graph reads
        self._of_graphs: list[torch.Tensor] = []  # everything that graphs read, kept alive
        self._stream = 0  # that orders what is read from `_device` and written there

    @property
    def is_in_graphs(self) -> bool:
        """Whether a CUDA graph reads from here."""
        return bool(self._of_graphs)

    def set_tensors(
        self,
        addresses: torch.Tensor,
        numels: torch.Tensor,
        rows: torch.Tensor,
        tensor_scalars: torch.Tensor,
        kept: torch.Tensor,
        layouts: torch.Tensor | None = None,
    ) -> None:
        """Say where n tensors lie. All arguments are CPU tensors.

        Shapes:
            addresses: int64 [streams, n], of p, g and the states; 0 where a state is absent.
            numels: int64 [n], numbers of elements.
            rows: int64 [n], which row of the hyper table is a tensor's.
            tensor_scalars: float64 [t, n], the rule's scalars per tensor.
            kept: int64 [k, n], addresses of the numbers kept per tensor; 0 where one is absent.
            layouts: int64 [n, 1 + streams, dims], sizes and each stream's strides in elements, the
                outermost dimension first; all 0 for a tensor whose streams are all contiguous.
        """
        self._follow_stream()
        self._upload("addresses", addresses)
        self._upload("tensor_scalars", tensor_scalars)
        if kept.numel():
            self._upload("kept", kept)
        self.dims = 0 if layouts is None else layouts.shape[2]
        if layouts is None:
            self._host.pop("layouts", None)
            self._device.pop("layouts", None)
        else:
            self._upload("layouts", layouts)
        tiles = (numels + TILE.value - 1) // TILE.value
        ends = tiles.cumsum(0)
        if self._upload("shapes", torch.stack([numels, ends - tiles, rows])):
            self.tensors = len(numels)
            self.tiles = int(tiles.sum())
            index = torch.arange(self.tensors, dtype=torch.int32, device="cpu")
            self._upload("tile_tensor", index.repeat_interleave(tiles))

    def set_hyper(self, hyper: torch.Tensor, device_lr: torch.Tensor | None = None) -> None:
        """Set float64 [rows, k + 1]: the rule's k hyper-parameters, then the gradient multiplier.

        A tensor that is on the device already is used as it is: later changes to it take effect.
        ``device_lr``: int64 [rows], addresses of learning rates (the first hyper-parameter) that
        are read on the device when the kernel runs, plus 1 where they are float64, else float32;
        0: the one in ``hyper``.
        """
        if device_lr is None:
            self._host.pop("device_lr", None)
            self._device.pop("device_lr", None)
        else:
            self._upload("device_lr", device_lr)
        if hyper.device == self.device and self.device.type != "cpu":
            self._host.pop("hyper", None)
            self._device["hyper"] = hyper
        else:
            self._upload("hyper", hyper)

    def get(self, *names: str) -> list[torch.Tensor | None]:
        """The copies of these tables on the device, for a kernel; None: one that is not needed."""
        found = [self._device.get(name) for name in names]
        if is_capturing(self.device):
            self._in_graphs.update(names)
            self._of_graphs += [table for table in found if table is not None]
        return found

    def _follow_stream(self) -> None:
        """On another stream than last time, begin with new tables: the old ones may be in use."""
        if self.device.type != "cuda" or is_capturing(self.device):
            return
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        if stream != self._stream:
            self._host.clear()
            self._device.clear()
            self._stream = stream

    def _upload(self, name: str, table: torch.Tensor) -> bool:
        """Copy a table to the device; return False where it is there already."""
        known = self._host.get(name)
        if known is not None and torch.equal(known, table):
            return False
        if is_capturing(self.device):
            self._upload_in_graph(name, table)
            return True
        self._host[name] = table.clone()
        if known is None or known.shape != table.shape or name in self._in_graphs:
            self._device[name] = torch.empty_like(table, device=self.device)
            self._in_graphs.discard(name)
        # torch keeps pinned memory until the copy is done, and does not wait for it.
        self._device[name].copy_(pinned(table, self.device), non_blocking=True)
        return True

    def _upload_in_graph(self, name: str, table: torch.Tensor) -> None:
        """Have every replay copy a table that is the graph's own."""
        self._host.pop(
            name, None
        )  # the graph may never be replayed: a later step must upload again
        try:
            source = pinned(table.clone(), self.device)
            self._device[name] = torch.empty_like(table, device=self.device)
            self._device[name].copy_(source, non_blocking=True)
        except RuntimeError as error:
            raise RuntimeError(
                "backend='triton' could not make its table of tensors part of the CUDA graph that "
                "is being captured; nothing was updated. Take two steps with the same parameters "
                "and gradients before the capture (zero_grad(set_to_none=False) keeps them where "
                f"they are), or use backend='cuda'. {type(error).__name__}: {error}"
            ) from error
        self._of_graphs.append(source)

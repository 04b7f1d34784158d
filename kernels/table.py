"""The tensors of one launch, as tables on the device that are uploaded only when they changed."""

from __future__ import annotations

import torch

from .sums import TILE


class Table:
    """The tensors of one launch; all of them have the same ``dtypes``: of p, g and the states.

    A table that is set again with the same content is not uploaded again. Uploads are ordered by
    the current stream and do not wait for it.
    """

    def __init__(self, device: torch.device, dtypes: tuple[torch.dtype, ...]):
        self.device = device
        self.dtypes = dtypes
        self.tensors = self.tiles = self.dims = 0
        self._host: dict[str, torch.Tensor] = {}
        self._device: dict[str, torch.Tensor] = {}

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
            index = torch.arange(self.tensors, dtype=torch.int32)
            self._upload("tile_tensor", index.repeat_interleave(tiles))

    def set_hyper(self, hyper: torch.Tensor) -> None:
        """Set float64 [rows, k + 1]: the rule's k hyper-parameters, then the gradient multiplier.

        A tensor that is on the device already is used as it is: later changes to it take effect.
        """
        if hyper.device == self.device and self.device.type != "cpu":
            self._host.pop("hyper", None)
            self._device["hyper"] = hyper
        else:
            self._upload("hyper", hyper)

    def get(self, *names: str) -> list[torch.Tensor | None]:
        """The copies of these tables on the device; None for one that is not needed."""
        return [self._device.get(name) for name in names]

    def _upload(self, name: str, table: torch.Tensor) -> bool:
        """Copy a table to the device; return False where it is there already."""
        known = self._host.get(name)
        if known is not None and torch.equal(known, table):
            return False
        self._host[name] = table.clone()
        if self.device.type == "cpu":
            self._device[name] = self._host[name]
            return True
        # torch keeps pinned memory until the copy is done, and does not wait for it.
        pinned = table.pin_memory()
        if known is not None and known.shape == table.shape:
            self._device[name].copy_(pinned, non_blocking=True)
        else:
            self._device[name] = pinned.to(self.device, non_blocking=True)
        return True

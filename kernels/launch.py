"""Launches the generic pass: tables on the device, uploaded only when they changed, one launch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable

import torch
import triton
import triton.language as tl

from ..rules import Rule
from .step import TILE, step_kernel

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Kernels compiled so far, by signature: Triton's own look-up costs more than the launch.
_compiled: dict[tuple, triton.compiler.CompiledKernel] = {}


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, int, int],
    device: torch.device,
    arguments: tuple,
    constants: tuple,
    signature: tuple,
    **options: int,
) -> None:
    """Run a kernel on the current stream of ``device``, compiled with ``options`` of Triton's.

    ``signature`` tells apart what needs a kernel of its own: the types of the arguments, and the
    constants. Raises RuntimeError, with nothing written, where the kernel cannot be run.
    """
    key = (kernel.__name__, device, signature)
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with guard:
            if key in _compiled:
                _compiled[key][grid](*arguments, *constants)
                return
            # One rounding per operation; Triton's default for enable_fp_fusion differs by version.
            compiled = kernel[grid](*arguments, *constants, enable_fp_fusion=False, **options)
    except Exception as error:
        raise RuntimeError(
            f"backend='triton' could not run its kernel on {device}, nothing was updated; "
            f"backend='reference' works without it. {type(error).__name__}: {error}"
        ) from error
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled


class Table:
    """The tensors of one launch, as tables on the device; all of them have the same dtypes.

    A table that is set again with the same content is not uploaded again. Uploads are ordered by
    the current stream and do not wait for it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.tensors = self.tiles = self.dims = 0
        self._host: dict[str, torch.Tensor] = {}
        self._device: dict[str, torch.Tensor] = {}

    def set_tensors(
        self,
        addresses: torch.Tensor,
        numels: torch.Tensor,
        rows: torch.Tensor,
        tensor_scalars: torch.Tensor,
        layouts: torch.Tensor | None = None,
    ) -> None:
        """Say where n tensors lie. All arguments are CPU tensors.

        Shapes:
            addresses: int64 [streams, n], of p, g and the states; 0 where a state is absent.
            numels: int64 [n], numbers of elements.
            rows: int64 [n], which row of the hyper table is a tensor's.
            tensor_scalars: float64 [t, n], the rule's scalars per tensor.
            layouts: int64 [n, 1 + streams, dims], sizes and each stream's strides in elements, the
                outermost dimension first; all 0 for a tensor whose streams are all contiguous.
        """
        self._upload("addresses", addresses)
        self._upload("tensor_scalars", tensor_scalars)
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

    def get(self, name: str) -> torch.Tensor | None:
        """A table's copy on the device."""
        return self._device.get(name)

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


_jit = functools.cache(triton.jit)


@functools.cache
def _constants(
    update: Callable,
    derive: Callable,
    hyper: int,
    tensor_scalars: int,
    dtypes: tuple[torch.dtype, ...],
    dims: int,
) -> tuple[tuple, int]:
    """The compile-time arguments of the kernel in its order, and its number of warps."""
    double = dtypes[0] == torch.float64
    warps = 8 if double else 4  # a float64 takes two registers
    named = {
        "UPDATE": _jit(update),
        "DERIVE": _jit(derive),
        "DTYPES": tuple(DTYPES[dtype] for dtype in dtypes),
        "COMPUTE": tl.float64 if double else tl.float32,
        "HYPER": hyper,
        "TENSOR_SCALARS": tensor_scalars,
        "DIMS": dims,
        "VECTOR": 16 // min(dtype.itemsize for dtype in dtypes),
        "PART": 32 * warps,
    }
    return tuple(named[name] for name in step_kernel.arg_names if name in named), warps


def run(
    rule: Rule,
    dtypes: tuple[torch.dtype, ...],
    table: Table,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Update all tensors of ``table`` by one launch on the current stream of its device.

    ``dtypes`` are those of the streams p, g, states. Gradients are multiplied by their row's
    multiplier and by 1 / ``grad_scale``; where ``found_inf`` is not zero nothing is written. Both
    are float32 tensors of one element on the device and are read there, without a wait.
    """
    if table.tiles == 0:
        return
    constants, warps = _constants(
        rule.update, rule.derive, len(rule.hyper), len(rule.tensor_scalars), dtypes, table.dims
    )
    arguments = (
        *map(
            table.get, ("tile_tensor", "shapes", "addresses", "tensor_scalars", "layouts", "hyper")
        ),
        grad_scale,
        found_inf,
        table.tensors,
    )
    signature = (rule.name, dtypes, table.dims, grad_scale is None, found_inf is None)
    # With a limit of its own the assembler does not spill for the sake of more programs at once.
    options = {"num_warps": warps, "maxnreg": 64}
    launch(
        step_kernel, (table.tiles, 1, 1), table.device, arguments, constants, signature, **options
    )


class Launcher:
    """Runs the steps of one rule. Its tables stay on the device from step to step."""

    def __init__(self, rule: Rule):
        self._rule = rule
        self._tables: dict[tuple, Table] = {}

    def run(
        self,
        batches: Iterable,
        hyper: torch.Tensor,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """Update the tensors of every batch, by one launch for each; see ``run`` and ``Batch``.

        ``hyper``: float64 [rows, k + 1], as ``Table.set_hyper`` takes it.
        """
        for batch in batches:
            key = (batch.device, batch.dtypes)
            table = self._tables.setdefault(key, Table(batch.device))
            table.set_tensors(
                batch.addresses, batch.numels, batch.rows, batch.tensor_scalars, batch.layouts
            )
            table.set_hyper(hyper)
            scalars = (None if t is None else t.to(batch.device) for t in (grad_scale, found_inf))
            run(self._rule, batch.dtypes, table, *scalars)

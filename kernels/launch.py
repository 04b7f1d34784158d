"""Launches the passes of a rule over the tensors of a step: one launch for each dtype signature."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import triton

from ..rules import Rule
from .passes import Pass, measure_of, pass_constants, settle_constants, update_of
from .step import pass_kernel, settle_kernel
from .table import Table

# Kernels compiled so far, by signature: Triton's own look-up costs more than the launch.
_compiled: dict[tuple, triton.compiler.CompiledKernel] = {}


def launch(
    kernel: triton.JITFunction,
    programs: int,
    device: torch.device,
    arguments: Sequence,
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
    grid = (programs, 1, 1)
    try:
        with guard:
            if key in _compiled:
                _compiled[key][grid](*arguments, *constants)
                return
            # One rounding per operation; Triton's default for enable_fp_fusion differs by version.
            compiled = kernel[grid](*arguments, *constants, enable_fp_fusion=False, **options)
    except Exception as error:
        raise RuntimeError(
            f"backend='triton' could not run its kernel on {device}, which has updated nothing; "
            f"backend='reference' works without it. {type(error).__name__}: {error}"
        ) from error
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled


class Launcher:
    """Runs the passes of one rule. Its tables stay on the device from step to step."""

    def __init__(self, rule: Rule):
        self._rule = rule
        self._update = update_of(rule)
        if rule.measure is not None:
            self._measure = measure_of(rule)
            self._settle = settle_constants(rule)
        self._constants: dict[tuple, tuple] = {}
        self._tables: dict[tuple, Table] = {}
        # What a measuring pass has found for the update that follows it.
        self._found: dict[Table, torch.Tensor] = {}

    @property
    def is_in_graphs(self) -> bool:
        """Whether a CUDA graph reads its tables: it must live as long as that."""
        return any(table.is_in_graphs for table in self._tables.values())

    def measure(
        self,
        batches: Iterable,
        hyper: torch.Tensor,
        updates: bool,
        device_lr: torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """Run the pass before the update, by two launches for each batch; arguments as for ``run``.

        It works out the scalars per tensor for the ``run`` that follows, where ``updates``.
        """
        self._found.clear()
        for table in self._tables_of(batches, hyper, device_lr):
            found = self.measure_table(table, updates, grad_scale, found_inf)
            if updates:
                self._found[table] = found

    def run(
        self,
        batches: Iterable,
        hyper: torch.Tensor,
        device_lr: torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """Update the tensors of every batch, by one launch for each; see ``Batch``.

        ``hyper`` and ``device_lr`` are as ``Table.set_hyper`` takes them. Gradients are multiplied
        by their row's multiplier and by 1 / ``grad_scale``; where ``found_inf`` is not zero nothing
        is written. Both are float32 tensors of one element, which are read on the device, without
        a wait.
        """
        for table in self._tables_of(batches, hyper, device_lr):
            self.update_table(table, grad_scale, found_inf, self._found.pop(table, None))

    def update_table(
        self,
        table: Table,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
        tensor_scalars: torch.Tensor | None = None,
    ) -> None:
        """Update the tensors of one table, with these scalars per tensor instead of its own."""
        if tensor_scalars is None:
            (tensor_scalars,) = table.get("tensor_scalars")
        self._run_pass(self._update, table, tensor_scalars, grad_scale, found_inf)

    def measure_table(
        self,
        table: Table,
        updates: bool,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the measuring pass on one table; return its scalars per tensor, float64 [t, n]."""
        (given,) = table.get("tensor_scalars")
        sums = given.new_empty(self._measure.sums, table.tiles)
        self._run_pass(self._measure, table, given, grad_scale, found_inf, sums)
        found = torch.empty_like(given)
        (device_lr,) = table.get("device_lr")
        arguments = (
            *table.get("shapes", "tensor_scalars", "kept", "hyper"),
            device_lr,
            _moved(found_inf, table.device),
            sums,
            found,
            table.tensors,
            table.tiles,
            int(updates),
        )
        signature = (self._rule.name, device_lr is None, found_inf is None)
        if table.tiles > 0:
            launch(
                settle_kernel,
                table.tensors,
                table.device,
                arguments,
                self._settle,
                signature,
                maxnreg=128,
            )
        return found

    def _run_pass(
        self,
        pass_: Pass,
        table: Table,
        tensor_scalars: torch.Tensor,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        sums: torch.Tensor | None = None,
    ) -> None:
        if table.tiles == 0:
            return
        key = (pass_.name, table.dtypes, table.dims)
        if key not in self._constants:
            self._constants[key] = pass_constants(self._rule, pass_, table.dtypes, table.dims)
        constants, options = self._constants[key]
        (device_lr,) = table.get("device_lr")
        arguments = (
            *table.get("tile_tensor", "shapes", "addresses"),
            tensor_scalars,
            *table.get("kept", "layouts", "hyper"),
            device_lr,
            _moved(grad_scale, table.device),
            _moved(found_inf, table.device),
            sums,
            table.tensors,
            table.tiles,
        )
        absent = (device_lr is None, grad_scale is None, found_inf is None)
        signature = (self._rule.name, *key, *absent)
        launch(pass_kernel, table.tiles, table.device, arguments, constants, signature, **options)

    def _tables_of(
        self, batches: Iterable, hyper: torch.Tensor, device_lr: torch.Tensor | None
    ) -> Iterator[Table]:
        """The tables of these batches, as they are now."""
        for batch in batches:
            key = (batch.device, batch.dtypes)
            table = self._tables.get(key)
            if table is None:
                table = self._tables[key] = Table(*key)
            table.set_tensors(
                batch.addresses,
                batch.numels,
                batch.rows,
                batch.tensor_scalars,
                batch.kept,
                batch.layouts,
            )
            table.set_hyper(hyper, device_lr)
            yield table


def _moved(scalar: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if scalar is None else scalar.to(device)

"""Runs checks where Triton interprets its kernels, and makes the tensors and tables for them.

Triton decides when it is imported whether kernels are interpreted, for a whole process. So that the
other tests, and torch.compile, keep the Triton that compiles, checks run in a second process.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import pytest
import torch
from cases import SETTINGS, bits

from fused_momentum import reference

pytest.importorskip("triton", reason="needs triton, which is not installed")
F32, F64, F16 = torch.float32, torch.float64, torch.float16
MULTIPLIERS = (1.0, -1.0, 0.5, -2.0)  # of the gradients of group i % 4
SIZES = (0, 1, 7, 1023, 1024, 1025, 10007)


def _patch_once_a_launch():
    """Triton patches its language anew at each call of a device function: most of a check's time.

    A module that was patched in a launch stays so until the launch is over.
    """
    from triton.runtime import interpreter

    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "GridExecutor")):
        return  # another Triton than the one that is tested: only slower
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(function)

    def launch_anew(*args, **kwargs):
        patched.clear()
        try:
            return launch(*args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


@pytest.fixture(name="interpreted", scope="module")
def interpreted_fixture():
    """``interpreted(check, *args)`` runs ``check(*args)`` in a process where Triton interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, get_context("spawn"), _patch_once_a_launch)
        pool.submit(os.getpid).result()  # started, with the environment as it is now
    with pool:
        yield lambda check, *args: pool.submit(check, *args).result()


class Item(NamedTuple):
    """A tensor: its streams p, g, states and kept numbers (None: absent), its row, first step."""

    streams: list
    row: int
    first: bool
    kept: list


def randn(size, dtype):
    """Values of many magnitudes, so that sums depend on their order."""
    return (torch.randn(size) * torch.exp2(torch.randint(-6, 6, size))).to(dtype)


def rows_of(rule):
    """Hyper-parameters of a few groups; in the last ones what is optional is absent."""
    if rule.read is not None:
        groups = [{"maximize": False, **group} for group in SETTINGS[rule.name].values()]
        return [[float(value) for value in rule.read(group, 3)] for group in groups]
    optional = [s.when for s in (*rule.states, *rule.kept) if s.when]
    rows = (0.05 + 0.9 * torch.rand(3, len(rule.hyper), dtype=F64)).tolist()
    rows[1][-1] = 0.0
    rows[2] = [0.0 if k in optional else v for k, v in zip(rule.hyper, rows[2], strict=True)]
    for i, row in enumerate(rows):
        for key, words in rule.choices.items():
            row[rule.hyper.index(key)] = float((2 - i) % len(words))
    return rows


def items_of(rule, signature, rows, sizes=SIZES):
    param, state = signature
    items = []
    for i, size in enumerate(sizes):
        size = (size,) if isinstance(size, int) else size
        row = i % len(rows)
        hyper = dict(zip(rule.hyper, rows[row], strict=True))

        def present(s, hyper=hyper):
            return s.when is None or hyper[s.when] != 0

        states = [randn(size, state) if present(s) else None for s in rule.states]
        kept = [
            torch.tensor(k.initial, dtype=getattr(torch, k.dtype)) if present(k) else None
            for k in rule.kept
        ]
        streams = [randn(size, param), randn(size, param), *states]
        items.append(Item(streams, row, i % 2 == 0, kept))
    return items


def clone(items):
    def copy(tensor):
        if tensor is None:
            return None
        # A copy with the same strides, and the same distance from 16-byte alignment.
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr() % 16 // tensor.element_size()
        memory = torch.zeros(start + max(extent, 1), dtype=tensor.dtype)
        view = memory.as_strided(tensor.shape, tensor.stride(), start)
        return view.copy_(tensor) if 0 not in tensor.stride() else tensor

    return [
        item._replace(streams=[*map(copy, item.streams)], kept=[*map(copy, item.kept)])
        for item in items
    ]


def batches_of(rule, items):
    from fused_momentum import kernels

    zeros = [0.0] * (len(rule.tensor_scalars) - 1)
    return kernels.batches(
        [kernels.Item(i.streams, i.row, [float(i.first), *zeros], i.kept) for i in items]
    )


def hyper_of(rows):
    return torch.tensor([[*row, MULTIPLIERS[i % 4]] for i, row in enumerate(rows)], dtype=F64)


def table_of(rule, items, rows):
    from fused_momentum.kernels import Table

    (batch,) = batches_of(rule, items)
    table = Table(batch.device, batch.dtypes)
    table.set_tensors(*batch[2:-1])
    table.set_hyper(hyper_of(rows))
    return table


def step(launcher, rule, items, rows, measures=True, updates=True, **amp):
    """One step by the kernels; ``measures``: with the pass before the update."""
    batches, hyper = batches_of(rule, items), hyper_of(rows)
    if measures and rule.measure is not None:
        launcher.measure(batches, hyper, updates, **amp)
    if updates:
        launcher.run(batches, hyper, **amp)


def reference_step(rule, items, rows, measures=True, updates=True, scale=1.0):
    """The same step by the reference; gradients are divided by ``scale``."""
    unscale = torch.tensor(1.0 / scale).item()  # rounded to float32
    for item in items:
        p, g, *states = item.streams
        update = reference.Update(
            rule,
            p,
            g,
            states,
            item.kept,
            rows[item.row],
            grad_multiplier=MULTIPLIERS[item.row % 4] * unscale,
            first=item.first,
        )
        if measures and rule.measure is not None and not update.settled():
            update.measure(updates)
        if updates:
            update.update()


def assert_equal(items, expected):
    """The same bits everywhere."""
    for i, (item, other) in enumerate(zip(items, expected, strict=True)):
        pairs = zip([*item.streams, *item.kept], [*other.streams, *other.kept], strict=True)
        for s, (tensor, wanted) in enumerate(pairs):
            if tensor is not None:
                differ = int((bits(tensor) != bits(wanted)).sum())
                assert not differ, f"tensor {i}, stream {s}: {differ} elements differ"

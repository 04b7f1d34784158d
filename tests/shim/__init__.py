"""The CUDA kernels' own source, compiled for the CPU, with every access to memory counted.

``shim.cpp`` runs each block and thread of a launch; this module builds it and hands tensors to it.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import torch
from cases import INTEGERS

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
]  # in the order of csrc/launch.h
MAX_DIMS, MAX_STREAMS, MAX_KEPT, TILE = 8, 7, 3, 1024


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p * MAX_STREAMS),
        ("kept", ctypes.c_void_p * MAX_KEPT),
        ("numel", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * MAX_DIMS),
        ("strides", ctypes.c_int64 * MAX_DIMS * MAX_STREAMS),
        ("row", ctypes.c_int32),
        ("dims", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * MAX_STREAMS),
        ("first", ctypes.c_uint8),
    )


class Launch(ctypes.Structure):
    _fields_ = (
        ("tensors", ctypes.POINTER(Tensor)),
        ("count", ctypes.c_int64),
        ("hyper", ctypes.c_void_p),
        ("grad_multiplier", ctypes.c_void_p),
        ("rule", ctypes.c_int32),
        ("hyper_stride", ctypes.c_int32),
        *((key, ctypes.c_void_p) for key in ("grad_scale", "found_inf", "first", "ticket")),
        *((key, ctypes.c_void_p) for key in ("lr", "lr_dtype")),
        *((key, ctypes.c_int32) for key in ("capturing", "tiles_per_block", "seed")),
        *((key, ctypes.c_int32) for key in ("skip_block", "repeat_block")),
        ("first_block", ctypes.c_int64),
        *((key, ctypes.c_int32) for key in ("measures", "updates")),
        *((key, ctypes.c_void_p) for key in ("tile_sums", "tensor_scalars")),
        ("generation", ctypes.c_uint64),
    )


class Result(ctypes.Structure):
    _fields_ = (
        *(
            (k, ctypes.c_int32)
            for k in ("code", "launches", "uploads", "large", "own_kernels", "kept")
        ),
        *((k, ctypes.c_int64) for k in ("blocks", "strays", "misaligned", "vectors", "scalars")),
    )


class Region(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("reads", ctypes.c_void_p),
        ("writes", ctypes.c_void_p),
    )


def has_compiler():
    return shutil.which(CXX[0]) is not None


def sources():
    """Every file that the shim and the kernels are compiled from."""
    csrc = ROOT / "csrc"
    files = [*csrc.glob("*.h"), csrc / "cpu" / "codec.h"]
    folders = (csrc / "rules", csrc / "cuda", HERE)
    files += [p for d in folders for p in d.iterdir() if p.suffix[:2] in (".h", ".c")]
    return sorted(files)


def digest(*words):
    """Changes with any source and any of the words."""
    text = b"".join(path.read_bytes() for path in sources()) + repr(words).encode()
    return hashlib.sha256(text).hexdigest()[:16]


@contextlib.contextmanager
def made_once(path):
    """One process makes the file while others wait: where to, or None if it is there.

    Half a file, left by a process that was stopped, is never taken for a whole one.
    """
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            yield None
        else:
            new = path.with_suffix(".new")
            yield new
            new.rename(path)


def build(folder):
    """Compile the shim into ``folder``, unless it is there, and load it."""
    library = Path(folder) / f"shim-{digest(CXX, FLAGS)}.so"
    with made_once(library) as new:
        if new:
            includes = [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
            subprocess.run([*CXX, *FLAGS, *includes, "-o", new, HERE / "shim.cpp"], check=True)
    return ctypes.CDLL(str(library))


def _address(tensor):
    return None if tensor is None else tensor.data_ptr()


def _describe(streams, row, first, kept):
    """A tensor of the launch from its streams p, g, states, and numbers; some may be None."""
    made = Tensor(numel=streams[0].numel(), row=row, first=bool(first), dims=streams[0].ndim)
    made.sizes[: made.dims] = streams[0].shape
    made.kept[: len(kept)] = [_address(number) for number in kept]
    for s, stream in enumerate(streams):
        made.dtype[s] = DTYPES.index((streams[0] if stream is None else stream).dtype)
        if stream is not None:
            made.data[s] = stream.data_ptr()
            made.strides[s][: made.dims] = stream.stride()
    return made


def _put_before(tensor, count):
    tensor.numel += count
    tensor.sizes[0] += count
    for s in range(MAX_STREAMS):
        if tensor.data[s]:
            tensor.data[s] -= count * tensor.strides[s][0] * DTYPES[tensor.dtype[s]].itemsize


class Counts:
    """How often each byte of the tensors was read and written."""

    def __init__(self, tensors):
        self.of = {}  # address of the memory: reads and writes of its bytes
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.of:
                self.of[storage.data_ptr()] = torch.zeros(2, storage.nbytes(), dtype=torch.uint8)

    def regions(self):
        return [
            Region(at, n := counts.shape[1], counts.data_ptr(), counts.data_ptr() + n)
            for at, counts in self.of.items()
        ]

    def are(self, tensor, reads, writes):
        """Whether each element was read and written so often, and nothing between them at all."""
        if tensor.numel() == 0:
            return True
        counts = self.of[tensor.untyped_storage().data_ptr()]
        want = torch.zeros_like(counts)
        of_elements = want.view(INTEGERS[tensor.element_size()])
        for row, expected in enumerate((reads, writes)):
            if expected:
                every_byte = int.from_bytes([expected] * tensor.element_size(), "little")
                at = row * of_elements.shape[1] + tensor.storage_offset()
                of_elements.as_strided(tensor.shape, tensor.stride(), at).fill_(every_byte)
        return torch.equal(want, counts)


class Shim:
    """Runs launches; ``run`` returns what was counted."""

    def __init__(self, folder):
        self.library = build(folder)
        self.words = functools.partial(self.library.shim_words)  # of the arguments: large or not

    def run(
        self, rule, tensors, *, hyper, multipliers=(), rows=None, first=None, kept=None, **options
    ):
        """One pass of rule number ``rule`` over tensors, each a list [p, g, *states].

        ``hyper``: one list of hyper-parameters per row. ``lr``: per row a tensor or None.
        ``first``: flags known to the host, ``flags``: a tensor of them in the device's memory.
        ``kept``: per tensor a list of numbers. ``measures``: the measuring pass, not the update.
        ``unknown``: a tensor that kernels may not touch. ``before``: elements that the first tensor
        is said to have before its own; the blocks that would work on them do not run.
        Other options are those of ShimLaunch in shim.cpp; tensors are passed by address.
        """
        count = len(tensors)
        rows, first = rows or [0] * count, first or [0.0] * count
        kept = kept or [()] * count
        described = (Tensor * count)(*map(_describe, tensors, rows, first, kept))
        before = options.pop("before", 0)
        if before:
            _put_before(described[0], before)
            options |= {"tiles_per_block": 1, "first_block": before // TILE}
        known = [t for of in (tensors, kept) for given in of for t in given]
        known += [options.get(key) for key in ("tile_sums", "tensor_scalars")]
        known += options.get("lr") or []
        unknown = options.pop("unknown", None)
        counts = Counts([t for t in known if t is not None and t is not unknown])
        regions = sorted(counts.regions(), key=lambda region: region.begin)
        self.library.shim_memory((Region * len(regions))(*regions), len(regions))
        table = torch.tensor(hyper, dtype=torch.float64)
        multiplier = torch.tensor(multipliers or [1.0] * len(hyper), dtype=torch.float64)
        launch = Launch(described, count, table.data_ptr(), multiplier.data_ptr(), rule)
        launch.hyper_stride = table.shape[-1]
        launch.first = _address(options.pop("flags", None))
        lrs = options.pop("lr", None)
        if lrs is not None:
            addresses = (ctypes.c_void_p * len(lrs))(*map(_address, lrs))
            dtypes = (ctypes.c_uint8 * len(lrs))(
                *(0 if t is None else DTYPES.index(t.dtype) for t in lrs)
            )
            launch.lr = ctypes.cast(addresses, ctypes.c_void_p)
            launch.lr_dtype = ctypes.cast(dtypes, ctypes.c_void_p)
        launch.skip_block = launch.repeat_block = -1
        for key, value in options.items():
            setattr(launch, key, _address(value) if isinstance(value, torch.Tensor) else value)
        result = Result()
        self.library.shim_run(ctypes.byref(launch), ctypes.byref(result))
        result.counts = counts
        return result

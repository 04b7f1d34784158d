"""The ceiling of every step with momentum: the machine's rate for p, m <- f(p, g, m).

3 reads and 2 writes: on a CPU by a plain C loop (stream.c), compiled at run time for this processor
and run by as many threads as torch uses; on a GPU by a plain Triton kernel (stream_gpu.py). They
share no code with any contestant. Without a C compiler, or Triton, by torch's operators, with 2
reads and 1 write each.
"""

import ctypes
import os
import shlex
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.timing import Contestant, nothing

NUMEL = 2**25  # 128 MiB a buffer: several times an ordinary last-level cache
LAUNCHED = 8  # times as many on a GPU, so that a launch from Python is nothing beside them
PASSES = 3  # calls of the C loop in a step, so that starting the threads is nothing beside them


def compiled():
    """The C function, or None without a compiler."""
    source = Path(__file__).with_name("stream.c")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "stream.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)]
        try:
            subprocess.run([*compiler, *flags], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        function = ctypes.CDLL(str(library)).stream
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long]
    return function


def wait_for_threads() -> None:
    """OpenMP's threads, of the contestant before, wait for work on processors that we need."""
    time.sleep(0.01)


class Stream:
    """Buffers and a way to stream through them; `how` names the way, `bytes` its traffic a step."""

    def __init__(self, device: torch.device):
        self.numel = NUMEL * (LAUNCHED if device.type == "cuda" else 1)
        self.buffers = [torch.ones(self.numel, device=device) for _ in range(3)]
        self.function = None if device.type == "cuda" else compiled()
        self.prepare = nothing if self.function is None else wait_for_threads
        way = self._by_triton if device.type == "cuda" else self._by_c
        self.bytes, self.how, self.step = way() or self._by_torch()

    def contestant(self) -> Contestant:
        """To be timed in the rounds of a case, so that its rate is that of the same minutes."""
        return Contestant(("stream",), self.step, self.prepare)

    def _by_triton(self) -> tuple | None:
        """One launch over the buffers."""
        try:
            from bench.stream_gpu import stream
        except ModuleNotFoundError:
            return None
        return 5 * 4 * self.numel, "Triton kernel", lambda: stream(*self.buffers)

    def _by_c(self) -> tuple | None:
        """Each thread streams through its own part several times; ctypes lets go of the GIL.

        A call a pass: of several passes in one call, a compiler may make one over the memory.
        """
        if self.function is None:
            return None
        threads = torch.get_num_threads()
        parts = [buffer.chunk(threads) for buffer in self.buffers]
        calls = [
            (*(tensor.data_ptr() for tensor in part), part[0].numel())
            for part in zip(*parts, strict=True)
        ]
        pool = ThreadPoolExecutor(threads)

        def passes(call: tuple) -> None:
            for _ in range(PASSES):
                self.function(*call)

        def step() -> None:
            list(pool.map(passes, calls))

        return PASSES * 5 * 4 * NUMEL, "C loop", step

    def _by_torch(self) -> tuple:
        """m += g, then p -= m: each reads two streams and writes one."""
        p, g, m = self.buffers

        def step() -> None:
            m.add_(g)
            p.sub_(m)

        return 6 * 4 * self.numel, "torch operators", step

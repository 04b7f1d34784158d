"""The Triton kernels compiled as for GPUs, without one: a stand-in driver records the launches.

Everything up to the launch is Triton's and ours as on a GPU: the binding of the arguments, the
compilation to PTX and machine code, the cache. The launches themselves are written down, not run.
"""

import os
import re
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from fused_momentum.rules import RULES

triton = pytest.importorskip("triton", reason="needs triton, which is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: Triton compiles nothing", allow_module_level=True)
kernels = pytest.importorskip("fused_momentum.kernels")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# p, g and each state.
SIGNATURES = {"f32": (F32, F32), "f64": (F64, F64), "bf16": (BF16, F32), "f16": (F16, F32)}
ARCHITECTURES = (80, 90, 100)


class RecordingDriver:
    """Stands in for Triton's CUDA driver: one device per architecture, numbered by it."""

    def __init__(self, architecture):
        self.architecture = architecture
        self.launches = []  # (name of the kernel, grid, arguments)
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (object(), object(), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 48 * 1024},
        )

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launches.append((source.fn.__name__, (x, y, z), arguments))

        return launch


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    monkeypatch.setattr(kernels.launch, "_compiled", {})


# Triton keeps what it has compiled per device, with the driver of that time.
DRIVERS = {f"sm_{architecture}": RecordingDriver(architecture) for architecture in ARCHITECTURES}


@pytest.fixture(params=DRIVERS)
def driver(request, monkeypatch):
    recorder = DRIVERS[request.param]
    recorder.launches.clear()
    # Not set_active: without a GPU its opposite, reset_active, fails.
    monkeypatch.setattr(triton.runtime.driver, "_active", recorder)
    return recorder


def table_of(rule, tensors=3, strided=False):
    streams = 2 + len(rule.states)
    table = kernels.Table(torch.device("cpu"))
    addresses = torch.arange(1, streams + 1)[:, None].expand(streams, tensors) * 4096
    layouts = torch.ones(tensors, 1 + streams, 2, dtype=torch.int64) if strided else None
    numels = torch.full((tensors,), 5000)
    first = torch.zeros(len(rule.tensor_scalars), tensors, dtype=torch.float64)
    table.set_tensors(addresses, numels, torch.zeros_like(numels), first, layouts)
    table.set_hyper(torch.ones(1, len(rule.hyper) + 1, dtype=torch.float64))
    return table


def dtypes_of(rule, signature):
    param, state = SIGNATURES[signature]
    return (param, param, *(state for _ in rule.states))


def compiled():
    """The only kernel that has been compiled."""
    (kernel,) = kernels.launch._compiled.values()
    return kernel


def machine_code_use(kernel, path):
    """Registers, stack and local memory of a thread, as the cubin says."""
    path.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}


def global_accesses(kernel):
    """How often each kind of access to global memory occurs in the PTX, and multiply-adds."""
    ptx = kernel.asm["ptx"]
    return Counter(re.findall(r"(?:ld|st)\.global[^\s]*|\bfma\S*|\bmad\.\S*f\d+", ptx))


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("name", RULES)
def test_step_kernel(name, signature, strided, driver, tmp_path):
    """16-byte accesses for every stream, nothing spilled, no multiply-add fused."""
    rule = RULES[name]
    dtypes = dtypes_of(rule, signature)
    kernels.run(rule, dtypes, table_of(rule, strided=strided))
    kernel = compiled()
    assert kernel.metadata.enable_fp_fusion is False
    found = global_accesses(kernel)
    assert not [op for op in found if op.startswith(("fma", "mad"))]
    # A program works on 1024 elements: so many 16-byte accesses are those of one thread.
    threads = 32 * kernel.metadata.num_warps
    wide = [dtype.itemsize * 1024 // threads // 16 for dtype in dtypes]
    suffix = "v2.b64" if signature == "f64" else "v4.b32"
    assert found[f"ld.global.{suffix}"] == sum(wide)
    assert found[f"st.global.{suffix}"] == sum(wide) - wide[1]
    used = machine_code_use(kernel, tmp_path / "kernel.cubin")
    assert used["STACK"] == used["LOCAL"] == 0
    # 48 KB in flight per multiprocessor, of 65,536 registers, need so many programs at once.
    programs = 65536 // (used["REG"] * threads)
    assert programs * 1024 * sum(dtype.itemsize for dtype in dtypes) >= 48 * 1024


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=SIGNATURES)
def test_sum_kernels(dtype, strided, driver, tmp_path):
    """Sums compile without spills and without fused multiply-adds."""
    table = table_of(RULES["sgd"], strided=strided)
    sums = kernels.tensor_sums((dtype,) * 3, table)
    assert sums.shape == (2, 3)
    grids = [(name, grid) for name, grid, _ in driver.launches]
    assert grids == [("tile_sums_kernel", (15, 1, 1)), ("tensor_sums_kernel", (3, 2, 1))]
    for i, kernel in enumerate(kernels.launch._compiled.values()):
        assert kernel.metadata.enable_fp_fusion is False
        assert not [op for op in global_accesses(kernel) if op.startswith(("fma", "mad"))]
        used = machine_code_use(kernel, tmp_path / f"{i}.cubin")
        assert used["STACK"] == used["LOCAL"] == 0


def compiled_otherwise(monkeypatch, **other):
    """The step kernel of SGD in float32, compiled with other options than ours."""
    made = []

    def launch(kernel, grid, device, arguments, constants, signature, **options):
        options = {"enable_fp_fusion": False, **options, **other}
        made.append(kernel[grid](*arguments, *constants, **options))

    monkeypatch.setattr(kernels.launch, "launch", launch)
    rule = RULES["sgd"]
    kernels.run(rule, dtypes_of(rule, "f32"), table_of(rule))
    return made[0]


def test_fused_multiply_adds_would_be_seen(driver, monkeypatch):
    """Negative control: with fusion on, the check finds them."""
    kernel = compiled_otherwise(monkeypatch, enable_fp_fusion=True)
    assert [op for op in global_accesses(kernel) if op.startswith("fma")]


def test_spills_would_be_seen(driver, monkeypatch, tmp_path):
    """Negative control: with too few registers, the check finds them."""
    kernel = compiled_otherwise(monkeypatch, maxnreg=24)
    assert machine_code_use(kernel, tmp_path / "kernel.cubin")["STACK"] > 0


def test_one_launch_whatever_the_number_of_tensors(driver):
    """3,000 tensors are one launch; the cached one passes on exactly what Triton's own did."""
    rule = RULES["sgd"]
    table = table_of(rule, tensors=3000)
    scale = torch.ones(1)
    for _ in range(2):
        kernels.run(rule, dtypes_of(rule, "f32"), table, grad_scale=scale, found_inf=scale)
    (name, grid, arguments), again = driver.launches
    assert (name, grid) == ("step_kernel", (3000 * 5, 1, 1))
    assert again == (name, grid, arguments)
    assert len(kernels.launch._compiled) == 1


def test_the_kernel_is_compiled_once_per_signature(driver):
    """Numbers of tensors, sizes, values and alignments of scalars need no kernel of their own."""
    rule = RULES["sgd"]
    dtypes = dtypes_of(rule, "f32")
    step_kernel = kernels.step.step_kernel
    before = len(step_kernel.device_caches[driver.architecture][0])
    for tensors, scale in ((1, torch.ones(4)[1:2]), (16, torch.ones(1)), (17, torch.ones(1))):
        kernels.launch._compiled.clear()
        kernels.run(rule, dtypes, table_of(rule, tensors=tensors), grad_scale=scale)
    assert len(driver.launches) == 3
    assert len(step_kernel.device_caches[driver.architecture][0]) <= before + 1


def test_tables_are_uploaded_only_when_they_changed():
    table = table_of(RULES["sgd"])
    hyper = table.get("hyper")
    table.set_hyper(hyper.clone())
    assert table.get("hyper") is hyper
    table.set_hyper(hyper * 2)
    assert torch.equal(table.get("hyper"), hyper * 2)


def test_a_failed_launch_says_so(driver, monkeypatch):
    """Triton's own error, which back-end it came from, and what to do."""

    def refuse(*args):
        raise RuntimeError("Triton Error [CUDA]: no kernel image is available")

    rule = RULES["sgd"]
    monkeypatch.setattr(driver.utils, "load_binary", refuse)
    kernels.step.step_kernel.device_caches.clear()
    with pytest.raises(RuntimeError, match=r"backend='triton' could not .* no kernel image"):
        kernels.run(rule, dtypes_of(rule, "f32"), table_of(rule))
    kernels.step.step_kernel.device_caches.clear()

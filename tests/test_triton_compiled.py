"""The Triton kernels compiled as for GPUs, without one: a stand-in driver records the launches.

Everything up to the launch is Triton's and ours as on a GPU: the binding of the arguments, the
compilation to PTX and machine code, the cache. The launches themselves are written down, not run.
"""

import os
import random
import re
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from toy_rule import SPY, TOY

from fused_momentum.rules import RULES as TABLE

triton = pytest.importorskip("triton", reason="needs triton, which is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: Triton compiles nothing", allow_module_level=True)
kernels = pytest.importorskip("fused_momentum.kernels")

RULES = {**TABLE, TOY.name: TOY}
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
            unload_module=lambda module: None,
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


def table_of(rule, signature="f32", tensors=3, strided=False):
    streams = 2 + len(rule.states)
    param, state = SIGNATURES[signature]
    table = kernels.Table(torch.device("cpu"), (param, param, *(state for _ in rule.states)))
    addresses = torch.arange(1, streams + 1)[:, None].expand(streams, tensors) * 4096
    layouts = torch.ones(tensors, 1 + streams, 2, dtype=torch.int64) if strided else None
    numels = torch.full((tensors,), 5000)
    first = torch.zeros(len(rule.tensor_scalars), tensors, dtype=F64)
    kept = torch.ones(len(rule.kept), tensors, dtype=torch.int64)
    table.set_tensors(addresses, numels, torch.zeros_like(numels), first, kept, layouts)
    table.set_hyper(torch.ones(1, len(rule.hyper) + 1, dtype=F64))
    return table


def update(rule, table, **amp):
    kernels.Launcher(rule).update_table(table, **amp)


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
    """How often each kind of access to global memory occurs in the PTX."""
    return Counter(re.findall(r"(?:ld|st)\.global[^\s]*", kernel.asm["ptx"]))


def inexact(kernel):
    """Operations of the PTX that do not round once to nearest: multiply-adds, approximations."""
    floats = re.findall(r"\b(?:div|rcp|sqrt|rsqrt|fma|mad|ex2|lg2)\.\S*f\d+", kernel.asm["ptx"])
    return [op for op in floats if not re.fullmatch(r"(?:div|rcp|sqrt)\.rn\.f\d+", op)]


def check_kernel(kernel, path):
    """No multiply-add fused, nothing approximated, nothing spilled; returns its registers."""
    assert kernel.metadata.enable_fp_fusion is False
    assert not inexact(kernel)
    used = machine_code_use(kernel, path)
    assert used["STACK"] == used["LOCAL"] == 0
    return used["REG"]


def streams_read(reads, rule):
    """The streams that a pass reads with some scalars: all others are never loaded."""
    streams = range(2 + len(rule.states))
    if reads is None:
        return list(streams)
    maker = random.Random(0)
    tries = [[maker.choice([0.0, 0.5, 1.0, 2.0, 3.0]) for _ in rule.scalars] for _ in range(500)]
    found = [reads(*scalars) for scalars in tries]
    return [s for s in streams if any(row[s] for row in found)]


def check_wide_accesses(kernel, table, read, written):
    """Every access to a whole tile is of 16 bytes, where a thread's part of it is no less."""
    # A program works on 1024 elements: so many 16-byte accesses are those of one thread.
    threads = 32 * kernel.metadata.num_warps
    wide = [dtype.itemsize * 1024 // threads // 16 for dtype in table.dtypes]
    suffix = "v2.b64" if table.dtypes[0] == F64 else "v4.b32"
    found = global_accesses(kernel)
    assert found[f"ld.global.{suffix}"] == sum(wide[s] for s in read)
    assert found[f"st.global.{suffix}"] == sum(wide[s] for s in written)


layouts = pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
signatures = pytest.mark.parametrize("signature", SIGNATURES)


@layouts
@signatures
@pytest.mark.parametrize("name", RULES)
def test_update(name, signature, strided, driver, tmp_path):
    """16-byte accesses for every stream that is read or written, and enough of them in flight."""
    rule, table = RULES[name], table_of(RULES[name], signature, strided=strided)
    update(rule, table)
    kernel = compiled()
    registers = check_kernel(kernel, tmp_path / "kernel.cubin")
    read = streams_read(rule.reads, rule)
    states = [2 + k for k, state in enumerate(rule.states) if state.name in rule.written]
    check_wide_accesses(kernel, table, read, [0, *states])
    assert all(kernel.metadata.num_warps * 512 <= 1024 * d.itemsize for d in table.dtypes)
    # 48 KB in flight per multiprocessor, of 65,536 registers, need so many programs at once.
    programs = 65536 // (registers * 32 * kernel.metadata.num_warps)
    assert programs * 1024 * sum(table.dtypes[s].itemsize for s in read) >= 48 * 1024


@layouts
@signatures
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.measure])
def test_measuring_pass(name, signature, strided, driver, tmp_path):
    """Two launches, of tiles and of tensors; only what is looked at is loaded."""
    rule, table = RULES[name], table_of(RULES[name], signature, strided=strided)
    assert kernels.Launcher(rule).measure_table(table, True).shape == (len(rule.tensor_scalars), 3)
    grids = [(name, grid) for name, grid, _ in driver.launches]
    assert grids == [("pass_kernel", (15, 1, 1)), ("settle_kernel", (3, 1, 1))]
    tiles, tensors = kernels.launch._compiled.values()
    check_kernel(tiles, tmp_path / "tiles.cubin")
    check_kernel(tensors, tmp_path / "tensors.cubin")
    writes = [2 + k for k, s in enumerate(rule.states) if s.name in rule.measure.writes]
    check_wide_accesses(tiles, table, streams_read(rule.measure.reads, rule), writes)


def test_what_is_never_read_is_not_loaded(driver):
    """Even where the rule looks at it: of p, g, a and b the last."""
    update(SPY, table_of(SPY))
    assert global_accesses(compiled())["ld.global.v4.b32"] == 3 * 2


def test_roots_and_quotients_are_rounded_to_nearest(driver):
    """In float32 and float64, where numbers are derived and settled and where elements are."""
    for signature, bits in (("f32", 32), ("f64", 64)):
        kernels.launch._compiled.clear()
        launcher, table = kernels.Launcher(TOY), table_of(TOY, signature)
        launcher.update_table(table)
        launcher.measure_table(table, True)
        update, tiles, tensors = kernels.launch._compiled.values()
        for kernel, sizes in ((update, {bits, 64}), (tiles, {bits}), (tensors, {64})):
            found = set(re.findall(r"\b(?:div|sqrt)\.rn\.f\d+", kernel.asm["ptx"]))
            assert found >= {f"{op}.rn.f{size}" for op in ("div", "sqrt") for size in sizes}


def compiled_otherwise(monkeypatch, **other):
    """The update of SGD in float32, compiled with other options than ours."""
    made = []

    def launch(kernel, programs, device, arguments, constants, signature, **options):
        options = {"enable_fp_fusion": False, **options, **other}
        made.append(kernel[programs, 1, 1](*arguments, *constants, **options))

    monkeypatch.setattr(kernels.launch, "launch", launch)
    update(RULES["sgd"], table_of(RULES["sgd"]))
    return made[0]


def test_fused_multiply_adds_would_be_seen(driver, monkeypatch):
    """Negative control: with fusion on, the check finds them."""
    kernel = compiled_otherwise(monkeypatch, enable_fp_fusion=True)
    assert inexact(kernel)


def test_spills_would_be_seen(driver, monkeypatch, tmp_path):
    """Negative control: with too few registers, the check finds them."""
    kernel = compiled_otherwise(monkeypatch, maxnreg=24)
    assert machine_code_use(kernel, tmp_path / "kernel.cubin")["STACK"] > 0


@pytest.mark.parametrize("name", ["sgd", "sgd_sai"])
def test_one_launch_whatever_the_number_of_tensors(name, driver):
    """3,000 tensors are one launch; the cached one passes on exactly what Triton's own did."""
    table = table_of(RULES[name], tensors=3000)
    scale = torch.ones(1)
    for _ in range(2):
        update(RULES[name], table, grad_scale=scale, found_inf=scale)
    (kernel, grid, arguments), again = driver.launches
    assert (kernel, grid) == ("pass_kernel", (3000 * 5, 1, 1))
    assert again == (kernel, grid, arguments)
    assert len(kernels.launch._compiled) == 1


def test_the_kernel_is_compiled_once_per_signature(driver):
    """Numbers of tensors, sizes, values and alignments of scalars need no kernel of their own."""
    rule, pass_kernel = RULES["sgd"], kernels.step.pass_kernel
    before = len(pass_kernel.device_caches[driver.architecture][0])
    for tensors, scale in ((1, torch.ones(4)[1:2]), (16, torch.ones(1)), (17, torch.ones(1))):
        kernels.launch._compiled.clear()
        update(rule, table_of(rule, tensors=tensors), grad_scale=scale)
    assert len(driver.launches) == 3
    assert len(pass_kernel.device_caches[driver.architecture][0]) <= before + 1


def test_tables_are_uploaded_only_when_they_changed():
    table = table_of(RULES["sgd"])
    (hyper,) = table.get("hyper")
    table.set_hyper(hyper.clone())
    assert table.get("hyper")[0] is hyper
    doubled = hyper * 2
    table.set_hyper(doubled)
    assert torch.equal(table.get("hyper")[0], doubled)


def test_a_failed_launch_says_so(driver, monkeypatch):
    """Triton's own error, which back-end it came from, and what to do."""

    def refuse(*args):
        raise RuntimeError("Triton Error [CUDA]: no kernel image is available")

    monkeypatch.setattr(driver.utils, "load_binary", refuse)
    kernels.step.pass_kernel.device_caches.clear()
    with pytest.raises(RuntimeError, match=r"backend='triton' could not .* no kernel image"):
        update(RULES["sgd"], table_of(RULES["sgd"]))
    kernels.step.pass_kernel.device_caches.clear()


def test_a_learning_rate_on_the_device_has_a_kernel_of_its_own(driver, tmp_path):
    """It is found by two loads more, before the tile's."""
    rule, table = RULES["sgd"], table_of(RULES["sgd"])
    update(rule, table)
    hyper = torch.ones(1, len(rule.hyper) + 1, dtype=F64)
    table.set_hyper(hyper, torch.tensor([4096]))
    update(rule, table)
    _, own = kernels.launch._compiled.values()
    check_kernel(own, tmp_path / "kernel.cubin")
    check_wide_accesses(own, table, [0, 1, 2], [0, 2])
    table.set_hyper(hyper)
    update(rule, table)
    assert len(kernels.launch._compiled) == 2


def test_a_float64_is_rounded_to_a_half_by_way_of_float32(driver, monkeypatch):
    """As torch does it; Triton by itself rounds once, and some halves differ."""
    monkeypatch.setitem(SIGNATURES, "f64_state_f16", (F64, F16))
    update(RULES["sgd"], table_of(RULES["sgd"], "f64_state_f16"))
    found = re.findall(r"cvt\.\S*f16\S*", compiled().asm["ptx"])
    assert any(".f16x2.f32" in op or ".f16.f32" in op for op in found), found
    assert not any(".f16.f64" in op for op in found), found


def test_another_stream_has_tables_of_its_own(monkeypatch):
    """What the last stream reads from the old ones is not overwritten."""
    table, stream = kernels.Table(torch.device("cuda", 0), (F32,) * 3), [7]
    monkeypatch.setattr(kernels.table, "is_capturing", lambda device: False)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: stream[0], raising=False
    )
    for now, kept in ((7, False), (7, True), (8, False)):
        stream[0] = now
        table._follow_stream()
        assert ("hyper" in table._device, "hyper" in table._host) == (kept, kept)
        table._device["hyper"] = table._host["hyper"] = torch.ones(1)


def test_a_learning_rate_that_is_on_the_host_again():
    table = table_of(RULES["sgd"])
    hyper = torch.ones(1, len(RULES["sgd"].hyper) + 1, dtype=F64)
    table.set_hyper(hyper, torch.tensor([4096]))
    table.set_hyper(hyper)
    assert table.get("device_lr") == [None]


def test_hyper_parameters_that_are_on_the_host_again(monkeypatch):
    monkeypatch.setattr(kernels.table, "pinned", lambda table, device: table)
    table = kernels.Table(torch.device("meta"), (F32,) * 3)
    host, there = torch.ones(1, 6, dtype=F64), torch.ones(1, 6, dtype=F64, device="meta")
    for hyper in (host, there, host):
        table.set_hyper(hyper)
        assert (table.get("hyper")[0] is there) == (hyper is there)

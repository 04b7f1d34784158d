"""What nvcc makes of the CUDA kernels: no spills, no contraction, accesses of 16 bytes.

No GPU takes part: the machine code is read, not run.
"""

import concurrent.futures
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import shim
from cases import RULES

ROOT = Path(__file__).parents[1]
ARCHS = ("80", "90", "100")
FILES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
KERNEL_FILES = [path for path in FILES if path.stem != "launch"]
# The reciprocal of the loss scale, in every kernel: approximations, and the multiply-adds of the
# Newton steps that make them exact, once more for tiny and huge ones. What another division or root
# adds was counted: at most 16 per approximation.
RECIPROCAL, MULTIPLY_ADDS, MORE = 5, 9, 16
# Elements that a thread moves per tile, and bytes of one, by the codec's name.
PER_THREAD = 8
ITEMSIZE = {"Float": 4, "Double": 8, "BFloat16": 2, "Half": 2}


def _nvcc():
    return shutil.which(os.environ.get("CUDA_HOME", "") + "/bin/nvcc") or shutil.which("nvcc")


def _disassembler():
    """The folder of cuobjdump and nvdisasm: the toolkit's, or the one that Triton brings."""
    folders = [Path(_nvcc()).resolve().parent] if _nvcc() else []
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    except ImportError:
        pass
    for folder in folders:
        if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
            return folder
    return None


NVCC, DISASSEMBLER = _nvcc(), _disassembler()
CONTRACTIBLE = re.compile(r"\b(?:add|sub|mul|div|rcp|sqrt)\.(?!rn\.)\S*f(?:32|64)\b")
# Conversions of 16-bit elements, arithmetic, stores, barriers.
USE = re.compile(r"IMAD\.U32|PRMT|HADD|F2F|[FD]ADD|[FD]MUL|[FD]FMA|MUFU|STG|BAR")
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME or on PATH"),
    pytest.mark.skipif(DISASSEMBLER is None, reason="no cuobjdump: neither toolkit's nor Triton's"),
]
files = pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
archs = pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)


def _flags():
    """NVCC_FLAGS of setup.py, which cannot be imported without being run."""
    text = (ROOT / "setup.py").read_text()
    lists = re.findall(r"^NVCC_FLAGS \+?= (\[.*?\])", text, re.MULTILINE)
    assert lists, "setup.py has no NVCC_FLAGS"
    return [flag for text in lists for flag in re.findall(r'"([^"]+)"', text)]


def _compile(path, folder):
    """One file for all architectures: code, PTX and the assembler's report."""
    flags = [*_flags(), "-Xptxas=-v"]
    flags += [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in ARCHS]
    made = Path(folder) / f"{path.stem}-{shim.digest(NVCC, flags)}.fatbin"
    log = made.with_suffix(".log")
    with shim.made_once(made) as new:
        if new:
            command = [NVCC, *flags, "-fatbin", "-o", str(new), str(path)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
            log.write_text(done.stdout + done.stderr)
    return made, log.read_text()


@pytest.fixture(scope="session")
def compiled(request):
    """Per file: the fat binary and the report."""
    folder = request.config.cache.mkdir("nvcc")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda path: _compile(path, folder), KERNEL_FILES)
        return dict(zip(KERNEL_FILES, made, strict=True))


def _dump(what, fatbin, *more):
    """Text of cuobjdump."""
    path = os.pathsep.join([str(DISASSEMBLER), os.environ["PATH"]])
    command = [str(DISASSEMBLER / "cuobjdump"), what, *more, str(fatbin)]
    done = subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    return done.stdout


def _functions(fatbin, arch):
    """Mangled name of each kernel, and its instructions in order."""
    parts = re.split(r"Function : ", _dump("-sass", fatbin, "-arch", f"sm_{arch}"))[1:]
    operation = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)")
    return {part.split()[0]: operation.findall(part) for part in parts}


def _codecs(name):
    """Codecs of parameter, gradient and state in a kernel's mangled name."""
    demangled = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout
    return re.findall(r"Codec<fused_momentum::cuda::(\w+)>", demangled)


def _rule(name):
    """The rule that is in a kernel's mangled name."""
    (rule,) = [rule for rule in RULES.values() if f"{len(rule.name)}{rule.name}" in name]
    return rule


def _streams(rule, reads):
    """How many streams a pass may read, by its table row."""
    if reads is None:
        return 2 + len(rule.states)
    return sum(read != 0 for read in reads(*[1.0] * len(rule.scalars)))


def _vector_accesses(rule, codecs):
    """Loads and stores of 16 bytes that a thread needs for its elements of a tile."""
    p, g, m = (PER_THREAD * ITEMSIZE[codec] // 16 for codec in codecs)
    return p + g + m * (_streams(rule, rule.reads) - 2), p + m * len(rule.written)


@files
def test_no_register_spills(compiled, path):
    _, report = compiled[path]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report)
    assert len(spills) >= len(kernels) > 0
    assert {arch for _, arch in kernels} == set(ARCHS)
    assert set(spills) == {("0", "0")}


@files
def test_no_multiply_add_is_contracted(compiled, path):
    """In PTX, where a division is one instruction; it is made of FFMA in machine code.

    What is rounded (.rn) by itself is never contracted by the assembler.
    """
    fatbin, _ = compiled[path]
    ptx = _dump("-ptx", fatbin)
    assert len(re.findall(r"\.target sm_", ptx)) == len(ARCHS)
    assert re.search(r"\bmul(\.rn)?\.f64\b", ptx), "no arithmetic found"
    assert not re.findall(r"\b(?:fma|mad)\.\S*f(?:16|32|64)\S*", ptx)
    assert not CONTRACTIBLE.findall(ptx)


@archs
@files
def test_machine_code_has_the_multiply_adds_of_division_alone(compiled, path, arch):
    for name, operations in _functions(compiled[path][0], arch).items():
        approximations = sum(op.startswith("MUFU") for op in operations)
        fused = sum(re.match(r"[FD]FMA", op) is not None for op in operations)
        assert approximations >= RECIPROCAL
        assert fused <= MULTIPLY_ADDS + MORE * (approximations - RECIPROCAL), name
        assert not [op for op in operations if op.startswith(("LDL", "STL"))], "local memory"


@archs
@pytest.mark.parametrize("stem", ["single_pass", "half_pass"])
def test_streams_move_in_accesses_of_16_bytes_all_loads_first(compiled, stem, arch):
    path = next(path for path in KERNEL_FILES if path.stem == stem)
    kernels = _functions(compiled[path][0], arch)
    assert len(kernels) % (2 * len(RULES)) == 0  # small and large arguments
    for name, operations in kernels.items():
        codecs = _codecs(name)
        assert len(codecs) == 3, name
        loads = [i for i, op in enumerate(operations) if re.match(r"LDG\.E\S*\.128", op)]
        stores = [i for i, op in enumerate(operations) if re.match(r"STG\.E\S*\.128", op)]
        assert (len(loads), len(stores)) == _vector_accesses(_rule(name), codecs), name
        assert max(loads) < min(stores), "a store comes before a load"


@archs
def test_kernels_for_any_types_have_accesses_of_16_bytes(compiled, arch):
    path = next(path for path in KERNEL_FILES if path.stem == "other_pass")
    every = sum(PER_THREAD * size // 16 for size in ITEMSIZE.values())
    for name, operations in _functions(compiled[path][0], arch).items():
        loads = [op for op in operations if re.match(r"LDG\.E\S*\.128", op)]
        stores = [op for op in operations if re.match(r"STG\.E\S*\.128", op)]
        rule = _rule(name)
        read, written = _streams(rule, rule.reads), 1 + len(rule.written)
        assert (len(loads), len(stores)) == (read * every, written * every), name


@archs
def test_measuring_kernels_have_all_loads_of_a_tile_in_flight(compiled, arch):
    """No element is converted, computed with or stored before the last one is asked for."""
    path = next(path for path in KERNEL_FILES if path.stem == "measure")
    kernels = _functions(compiled[path][0], arch)
    measuring = [rule for rule in RULES.values() if rule.measure is not None]
    # Small and large arguments: three combinations of types and two for any, and the sums.
    assert len(kernels) == 2 * (3 + 2 + 1) * len(measuring)
    for name, operations in kernels.items():
        if len(_codecs(name)) != 3:
            continue
        rule = _rule(name)
        marks = ["L" if op.startswith("LDG") else "x" if USE.match(op) else "" for op in operations]
        in_flight = max(map(len, "".join(marks).split("x")))
        assert in_flight >= PER_THREAD * _streams(rule, rule.measure.reads), name


def test_contraction_is_seen_where_it_is_allowed(tmp_path):
    """The same source without -fmad=false has fma in its PTX."""
    path = next(path for path in KERNEL_FILES if path.stem == "single_pass")
    flags = [flag for flag in _flags() if flag != "-fmad=false"]
    assert len(flags) < len(_flags())
    ptx = tmp_path / "contracted.ptx"
    target = ["-arch=compute_90", "-ptx", "-o", ptx, path]
    subprocess.run([NVCC, *flags, *target], cwd=ROOT, check=True)
    assert re.search(r"\bfma\.rn\.f32", ptx.read_text())
    assert CONTRACTIBLE.search(ptx.read_text())

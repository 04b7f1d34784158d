"""Builds fused_momentum._C from csrc/; the package's metadata is in pyproject.toml.

CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are read as torch reads them, and
FUSED_MOMENTUM_CUDA               0 leaves CUDA out, 1 fails where it cannot be built,
FUSED_MOMENTUM_NO_EXTENSION       1 installs pure Python,
FUSED_MOMENTUM_REQUIRE_EXTENSION  1 makes every warning below an error.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from glob import glob
from pathlib import Path

from setuptools import setup

CXX_FLAGS = ["-O3", "-fopenmp", "-fno-plt"]  # no -std: torch adds the one of its headers
CXX_FLAGS += ["-ffp-contract=off"]  # one rounding per operation: a * b + c is never fused
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]  # sqrt and selects vectorise, same values
CXX_FLAGS += ["-fvisibility=hidden"]  # no symbol of ours may meet another library's
CXX_FLAGS += ["-g0"]  # Python's own flags ask for debug symbols: a file many times larger
NVCC_FLAGS = ["-O3", "-std=c++17", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["-fmad=false", "-Xcompiler=-ffp-contract=off"]  # as for C++, on device and host
CUDA_ARCHS = ["8.0", "9.0", "10.0", "12.0"]  # those that nvcc knows, and PTX of the last of them
CUDA_LIBRARIES = ["cudart_static", "dl", "rt", "pthread"]  # static: loads where CUDA is missing

CXX = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
NVCC = shutil.which(os.environ.get("CUDA_HOME", "") + "/bin/nvcc") or shutil.which("nvcc")
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))
CUDA = os.environ.get("FUSED_MOMENTUM_CUDA", "")
STRICT = os.environ.get("FUSED_MOMENTUM_REQUIRE_EXTENSION", "")
ALL = "the C++ and CUDA kernels: steps run on Triton or, slower, on plain torch"
say = partial(print, "fused_momentum:", flush=True)


def go_without(lost, why, strict=STRICT):
    if "1" in strict:
        sys.exit(f"fused_momentum: ERROR: {why}")
    say(f"WARNING: {why}; going on without {lost}")
    for old in glob("build/lib*/fused_momentum/_C*") + glob("fused_momentum/_C*"):
        os.remove(old)  # it would be installed in place of the one that failed


def file_with(path, lines):
    """Write the lines only where they differ: a file that stays old is not compiled again."""
    file, text = Path(path), "\n".join(lines) + "\n"
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def nvcc_command():
    known = re.findall(r"compute_(\d+)", subprocess.getoutput(f"{NVCC} --list-gpu-arch"))
    default = ";".join(arch for arch in CUDA_ARCHS if arch.replace(".", "") in known) + "+PTX"
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    say(f"building {len(CUDA_SOURCES)} CUDA files for {archs}, because {NVCC} is there")
    command = [NVCC, f"-ccbin={shlex.split(CXX)[-1]}", *NVCC_FLAGS]
    for number, ptx in re.findall(r"(\d+\.\d+[af]?)(\+PTX)?", archs):
        arch = number.replace(".", "")
        command += [f"-gencode=arch=compute_{arch},code=[sm_{arch}{ptx and f',compute_{arch}'}]"]
    return shlex.join(command)


def add_cuda(extension):
    """Run nvcc and link its objects; torch's CUDAExtension refuses beside a CPU-only torch."""
    if not NVCC:
        raise FileNotFoundError("not in CUDA_HOME, not on PATH")
    objects = {f"build/nvcc/{Path(source).stem}.o": source for source in CUDA_SOURCES}
    lines = ["builddir = build/nvcc", "rule nvcc", "  depfile = $out.d"]
    lines += [f"  command = {nvcc_command()} -MD -MF $out.d -c $in -o $out"]
    lines += [f"build {target}: nvcc {source}" for target, source in objects.items()]
    ninja_file = file_with("build/nvcc/build.ninja", lines)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    subprocess.run(["ninja", "-f", ninja_file, "-j", jobs], check=True)
    settings = subprocess.getoutput(f"{NVCC} --dryrun -c {CUDA_SOURCES[0]}")
    toolkit = re.search(r"TOP=(\S+)", settings)[1]
    extension.extra_objects += objects
    extension.library_dirs += [f"{toolkit}/lib64", f"{toolkit}/lib"]
    extension.libraries += CUDA_LIBRARIES
    extension.define_macros += [("FUSED_MOMENTUM_CUDA", "1")]


def extension_options():
    """What setup() needs to build the extension; raises where there is no torch."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                go_without(ALL, error)
                self.extensions = []

    torch_files, other_files = sorted(glob("csrc/*.cpp")), sorted(glob("csrc/cpu/*.cpp"))
    count = len(torch_files) + len(other_files)
    say(f"building {count} C++ files for torch {torch.__version__}, because {CXX} is there")
    # For the compiler alone: torch's headers are most of the time that each file would take.
    as_one = file_with("build/torch_files.cpp", (f'#include "../{path}"' for path in torch_files))
    sources = [as_one, *other_files]
    extension = CppExtension("fused_momentum._C", sources, include_dirs=[os.path.abspath("csrc")])
    extension.depends = sorted(glob("csrc/**/*.*", recursive=True))
    extension.extra_compile_args, extension.extra_link_args = CXX_FLAGS, ["-fopenmp"]
    if CUDA == "1" or (CUDA != "0" and NVCC and CUDA_SOURCES):
        try:
            add_cuda(extension)
        except Exception as error:
            go_without("the CUDA kernels", f"nvcc: {error}", CUDA + STRICT)
    else:
        say(f"no CUDA kernels: {CUDA=}, {NVCC=}, {len(CUDA_SOURCES)} CUDA files")
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


options = {}
if {"egg_info", "dist_info", "sdist"} & set(sys.argv):
    pass  # metadata needs no compiler
elif os.environ.get("FUSED_MOMENTUM_NO_EXTENSION") == "1":
    go_without(ALL, "FUSED_MOMENTUM_NO_EXTENSION=1", strict="")
elif not shutil.which(shlex.split(CXX)[0]):
    go_without(ALL, f"there is no C++ compiler {CXX}")
else:
    try:
        options = extension_options()
    except (ImportError, OSError) as error:
        go_without(ALL, f"{error} (torch comes first, then this with --no-build-isolation)")
setup(**options)

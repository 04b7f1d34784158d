"""The project's shape: who imports whom, sizes, and examples in docstrings that are true."""

import ast
import doctest
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import fused_momentum

ROOT = Path(__file__).parents[1]
NAME = "fused_momentum"

# Which modules of ours each module may import; a package stands for all in it.
ARROWS = {
    "_version": set(),
    "rules": {"rules", "checks", "windows"},
    "native": set(),
    "flat": set(),
    "graphs": set(),
    "shards": set(),
    "checks": set(),
    "windows": {"windows"},
    "reference": {"rules"},
    "kernels": {"kernels", "graphs", "rules"},
    "backends": {"native"},
    "scales": {"checks", "collective", "reference", "rules", "shards"},
    "collective": {"reference", "rules", "shards"},
    "states": {"flat", "reference", "rules", "shards"},
    "walk": {"checks", "kernels", "reference", "rules", "shards"},
    "watch": {"graphs", "rules"},
    "plan": {
        "backends",
        "collective",
        "kernels",
        "native",
        "rules",
        "shards",
        "states",
        "walk",
        "watch",
    },
    "ops": {"backends", "checks", "kernels", "native", "reference", "rules", "shards"},
    "optimizers": {
        "optimizers",
        "backends",
        "checks",
        "flat",
        "plan",
        "rules",
        "shards",
        "states",
        "windows",
    },
    "": {"_version", "backends", "flat", "ops", "optimizers", "scales", "windows"},
}
ELSE = {"torch", "triton", "matplotlib", "numpy"}  # the last two where a function needs them


def _modules():
    """Full name and file of every module of the package; kernels/ is installed inside it."""
    for folder, package in ((ROOT / NAME, NAME), (ROOT / "kernels", f"{NAME}.kernels")):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(p for p in parts if p != "__init__")]), file


MODULES = dict(_modules())
modules = pytest.mark.parametrize(("module", "file"), MODULES.items(), ids=MODULES)


def _imported(module, file):
    """Full names of everything that a file imports, anywhere in it."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            # `from package import module` imports the module.
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield ast.literal_eval(node.args[0])


def _room(module):
    return module.removeprefix(NAME).lstrip(".").partition(".")[0]


@modules
def test_imports_go_one_way(module, file):
    assert _room(module) in ARROWS, f"say in ARROWS what {module} may import"
    for name in _imported(module, file):
        top = name.partition(".")[0]
        if top == NAME:
            room = _room(name)
            if room == "_C":
                assert _room(module) == "native", f"{module} imports the extension past native"
            else:
                assert room in ARROWS[_room(module)], f"{module} must not import {name}"
        else:
            assert top in sys.stdlib_module_names or top in ELSE, f"{module} imports {name}"


def test_every_arrow_is_there():
    """One that nobody needs any more is not there to be used again."""
    used = {room: set() for room in ARROWS}
    for module, file in MODULES.items():
        rooms = [_room(name) for name in _imported(module, file) if name.startswith(NAME)]
        used[_room(module)] |= set(rooms) - {"_C"}
    assert used == ARROWS


def test_the_arrows_have_no_circle():
    for start in ARROWS:
        reached, found = set(), ARROWS[start] - {start}
        while found:
            reached |= found
            found = {b for a in found for b in ARROWS[a] - {a}} - reached
        assert start not in reached


PYTHON = re.compile(r"Python\.h|pybind11|torch/|plan\.h|peek\.h")
SOURCES = sorted(f for f in (ROOT / "csrc").rglob("*") if f.suffix in {".h", ".cpp", ".cu", ".cuh"})


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_kernels_know_no_python_and_cuda_no_torch(file):
    """What turns tensors and optimizers into launches is in csrc/*.cpp, plan.h and peek.h."""
    included = re.findall(r'^\s*#\s*include\s*[<"](.+)[>"]', file.read_text(), re.MULTILINE)
    assert included or file.suffix != ".cpp", "the search for includes has found none"
    if file.parent.name != "csrc" or (
        file.suffix == ".h" and file.name not in {"plan.h", "peek.h"}
    ):
        assert not [name for name in included if PYTHON.search(name)]
    if file.parent.name == "cuda":
        assert not [name for name in included if re.match("ATen|c10", name)]
    if file.name in {"rules.h", "codec.h"} or file.parent.name == "rules":
        known = r"array$|cmath$|table\.h$|rules/"
        others = [name for name in included if not re.match(known, name)]
        assert not others, f"{file.name} is arithmetic and nothing else"


# --- sizes and words -------------------------------------------------------------------------

FOLDERS = (".ci", NAME, "kernels", "csrc", "tests", "bench", "examples")
TEXT = {".py", ".h", ".cpp", ".cu", ".cuh", ".c", ".md", ".toml", ".txt", ".csv", ".in", ""}
FILES = [f for folder in FOLDERS for f in sorted((ROOT / folder).rglob("*")) if f.is_file()]
FILES += [f for f in sorted(ROOT.iterdir()) if f.is_file()]
FILES = [f for f in FILES if f.suffix in TEXT and not {".git", "__pycache__"} & set(f.parts)]
files = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))

LONGEST_FUNCTION = 50


def _longest(file):
    if file == ROOT / "setup.py":
        return 140
    return 450 if file.parent.name == "tests" else 400


@files
def test_files_and_functions_are_short(file):
    text = file.read_text(encoding="utf-8")
    if file.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}:
        assert text.count("\n") <= _longest(file)
    if file.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.body[0].lineno + 1
                if ast.get_docstring(node):
                    length = node.end_lineno - node.body[0].end_lineno
                assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


@files
def test_no_path_of_some_machine(file):
    found = re.findall(r"(?<![\w.])/(?:work|tmp|root|home|opt)/\S*", file.read_text("utf-8"))
    assert not found


def test_make_gpu_runs_every_test_that_waits_for_a_gpu():
    listed = set(re.findall(r"tests/test_gpu\w*\.py", (ROOT / "Makefile").read_text("utf-8")))
    there = {f"tests/{file.name}" for file in (ROOT / "tests").glob("test_gpu*.py")}
    assert listed == there


# --- docstrings ------------------------------------------------------------------------------


EXAMPLES = [name for name, file in MODULES.items() if ">>> " in file.read_text("utf-8")]


@pytest.mark.parametrize("module", EXAMPLES)
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


def _public():
    for name in fused_momentum.__all__:
        member = getattr(fused_momentum, name)
        if callable(member):
            yield name, member


PUBLIC = dict(_public())


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings_and_classes_an_example(name):
    text = PUBLIC[name].__doc__
    assert text
    if isinstance(PUBLIC[name], type):
        assert ">>> " in text
        assert PUBLIC[name].__module__ in EXAMPLES

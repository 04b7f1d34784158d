"""Instructions of a step on the CPU, counted by valgrind: a guard that no noise can trip.

    python -m bench.instructions [--write]

Compares with bench/results/instructions.csv, or writes it. Python, the walk over the tensors and
the kernel are all counted, on one thread; valgrind knows no AVX-512, so the kernel is the AVX2 one.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fused_momentum as fm
from bench import arena, records
from bench.cases import CASES
from bench.providers import SGD_HYPER
from bench.text import markdown

COUNTED = ("300x64", "3000x1024", "500_mixed")
WARM_UP, STEPS = 3, 4
ROOM = 0.05
FILE = records.RESULTS / "instructions.csv"
MISSING = "valgrind is not installed: apt-get install valgrind, or brew install valgrind"
COLUMNS = ["case", "instructions of a step", "python", "torch", "compiler", "commit"]


def take_steps() -> None:
    """In the process under valgrind: the steps of each case, with a dump after each."""
    torch.set_num_threads(1)
    for name in COUNTED:
        case = arena.build(CASES[name](), torch.float32, torch.device("cpu"))
        optimizer = fm.FusedSGD(case.params, **SGD_HYPER, backend="cpu")
        for _ in range(WARM_UP):
            optimizer.step()
        torch._C._valgrind_toggle()
        for _ in range(STEPS):
            optimizer.step()
        torch._C._valgrind_toggle_and_dump_stats()


def count() -> dict[str, int]:
    """Instructions of one step of each case; a minute or two."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind"
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no"]
        command += [f"--callgrind-out-file={out}", sys.executable, "-c"]
        command += ["from bench.instructions import take_steps; take_steps()"]
        fixed = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(
            command, cwd=records.ROOT, env=os.environ | fixed, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"valgrind failed:\n{done.stderr[-2000:]}")
        dumps = [Path(f"{out}.{i}") for i in range(1, len(COUNTED) + 1)]
        totals = [total(path.read_text()) for path in dumps]
    return {name: number // STEPS for name, number in zip(COUNTED, totals, strict=True)}


def total(dump: str) -> int:
    """The instructions in a dump of callgrind."""
    events = re.search(r"^events: (.+)$", dump, re.MULTILINE)
    totals = re.search(r"^totals: (.+)$", dump, re.MULTILINE)
    if not events or not totals or "Ir" not in events[1].split():
        raise ValueError(f"not a dump of callgrind with instructions: {dump[:200]!r}")
    return int(totals[1].split()[events[1].split().index("Ir")])


def compare(counted: dict[str, int], stored: dict[str, int]) -> list[str]:
    """What to say of each case, the ones that are too dear first with "TOO MANY"."""
    lines = []
    for name, now in counted.items():
        before = stored.get(name)
        if before is None:
            lines.append(f"TOO MANY: {name}: {now:,} instructions, nothing stored to compare with")
            continue
        word = "TOO MANY: " if now > before * (1 + ROOM) else ""
        hint = "; fewer: store them with --write" if now < before * (1 - ROOM) else ""
        change = f"{now / before - 1:+.1%} of {before:,}"
        lines.append(f"{word}{name}: {now:,} instructions, {change}{hint}")
    return lines


def compiler() -> str:
    """The C++ compiler that would build the extension here."""
    command = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(command) is None:
        return "none"
    run = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[0]


def here() -> dict:
    """What the counts depend on."""
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": compiler(),
        "commit": records.commit(),
    }


def section() -> list[str]:
    """What bench/results/README.md says of the stored counts."""
    if not FILE.exists():
        return []
    rows = records.read(FILE)
    lines = [
        [row["case"], f"{row['instructions']:,}", *(row[c] for c in COLUMNS[2:])] for row in rows
    ]
    text = f"`make bench-check` counts them anew and allows {ROOM:.0%} more."
    return ["## Instructions of a step on the CPU", "", text, "", markdown(COLUMNS, lines)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="store the counts")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        print(MISSING)
        return 2
    counted = count()
    if options.write:
        rows = [{"case": name, "instructions": n} for name, n in counted.items()]
        records.write(FILE, rows, here())
        print(FILE)
        return 0
    rows = records.read(FILE) if FILE.exists() else []
    lines = compare(counted, {row["case"]: row["instructions"] for row in rows})
    print(*lines, sep="\n")
    now = here()
    others = [
        k for k in ("machine", "python", "torch", "compiler") if rows and rows[0][k] != now[k]
    ]
    if others:
        print("stored with another", *(f"{k} ({rows[0][k]}, here {now[k]})" for k in others))
    return int(any(line.startswith("TOO MANY") for line in lines))


if __name__ == "__main__":
    sys.exit(main())

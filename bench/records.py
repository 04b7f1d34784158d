"""CSV files with versions in every row: written by a run, read by everything else."""

import csv
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from bench.providers import RULES

ROOT = Path(__file__).parents[1]
STEP_TABLES = [f"step_{rule}" for rule in RULES]
RESULTS = ROOT / "bench" / "results"
TEXT = {"device", "python", "torch", "cuda", "triton", "fused_momentum", "commit", "version"}


def device_name(device: torch.device) -> str:
    """Marketing name of the processor or GPU; with numbers where a processor's name has none."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    return processor_name(cpuinfo.read_text() if cpuinfo.exists() else "")


def processor_name(cpuinfo: str) -> str:
    """The name in a /proc/cpuinfo. Virtual machines hide the model in it: then its numbers too."""
    lines = r"^(model name|cpu family|model)\s*:\s*(.+?)\s*$"
    found = dict(re.findall(lines, cpuinfo, re.MULTILINE))
    name = found.get("model name") or platform.processor() or platform.machine()
    if re.search(r"\d", name) or "model" not in found:
        return name
    return f"{name} (family {found['cpu family']}, model {found['model']})"


def slug(name: str) -> str:
    """`name` as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """Short hash of the checkout, with + when it has changes; "none" outside git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "none"


def environment(device: torch.device) -> dict:
    """The columns that say where and with what a row was measured."""
    import fused_momentum

    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else "none",
        "triton": triton,
        "fused_momentum": fused_momentum.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


class Load:
    """The share of all processors that others used since construction; Linux only."""

    def __init__(self):
        self.begin = self._seconds()

    @staticmethod
    def _seconds() -> tuple[float, float] | None:
        """Processor seconds that others used (stolen ones too), and seconds in all, since boot."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        ticks = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
        everything = sum(ticks) / os.sysconf("SC_CLK_TCK")
        idle = sum(ticks[3:5]) / os.sysconf("SC_CLK_TCK")
        return everything - idle - sum(os.times()[:4]), everything

    def share(self) -> float | str:
        """Fraction in [0, 1], or "unknown"."""
        if self.begin is None:
            return "unknown"
        others, everything = (b - a for a, b in zip(self.begin, self._seconds(), strict=True))
        return min(max(others / everything, 0.0), 1.0)


def write(path: Path, rows: list[dict], where: dict) -> None:
    """Write rows with the environment appended to each; columns in order of first appearance."""
    rows = [{key: tidy(value) for key, value in (row | where).items()} for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [key for key in columns if key not in where] + list(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def tidy(value):
    """Four significant digits: more is noise."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def number(key: str, text: str):
    """`text` as a number where it is one; names and versions never are."""
    for kind in () if key in TEXT else (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def read(path: Path) -> list[dict]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return [{k: number(k, v) for k, v in row.items()} for row in csv.DictReader(file)]


def names(rows: list[dict], key: str) -> list[str]:
    """The different values of a column, in order."""
    return list(dict.fromkeys(row[key] for row in rows))


class Results:
    """The CSV files of one folder, as lists of rows; numbers are numbers, "" is not measured."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tables = {path.stem: read(path) for path in sorted(folder.glob("*.csv"))}

    def rows(self, table: str, **wanted) -> list[dict]:
        """The rows of a table with these values that were measured."""
        return [
            row
            for row in self.tables.get(table, ())
            if row.get("status", "ok").startswith("ok")
            and all(row.get(key) == value for key, value in wanted.items())
        ]

    def row(self, table: str, **wanted) -> dict | None:
        """The first of `rows`."""
        return next(iter(self.rows(table, **wanted)), None)

    @property
    def where(self) -> dict:
        """The environment of some row."""
        return next(row for rows in self.tables.values() for row in rows)

    @property
    def on_gpu(self) -> bool:
        """Whether these are from a GPU."""
        return self.where["cuda"] != "none"

    @property
    def step_tables(self) -> list[str]:
        """Names of the tables of steps, one for each rule, in the order of the rules."""
        return [name for name in STEP_TABLES if name in self.tables]


def all_results(root: Path = RESULTS) -> list[Results]:
    """The results of every device, GPUs first."""
    folders = sorted({path.parent for path in root.glob("*/*.csv")})
    return sorted(map(Results, folders), key=lambda results: not results.on_gpu)

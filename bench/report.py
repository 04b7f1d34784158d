"""What a run leaves: CSV files with versions in every row, and tables on the screen."""

import csv
import datetime
import os
import platform
import re
import subprocess
from math import nan
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.memory import DICT_ONLY
from bench.providers import BASELINES, FUSED, OURS

ROOT = Path(__file__).parents[1]
# Bars of the project: (case, dtype, baseline, least ratio of times).
RATIO_BARS = (
    ("300x64", "float32", FUSED, 30.0),
    ("3000x1024", "float32", FUSED, 8.0),
    ("resnet50", "float32", FUSED, 1.1),
    ("1x64M", "float32", FUSED, 1.0),
)
BAR_CASES = [case for case, *_ in RATIO_BARS]
HOST_BAR_US, HOST_BAR_NS = 15.0, 30.0
STATE_BAR_BYTES = 200
STEP_HEADS = ("µs", "p20 - p80", "GB/s", "stream", "allocs", "error")


def device_name(device: torch.device) -> str:
    """Marketing name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
    return found.group(1).strip() if found else platform.processor() or platform.machine()


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
    cuda = {"cuda": torch.version.cuda} if device.type == "cuda" else {"cuda": "none"}
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **cuda,
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


def write_csv(path: Path, rows: list[dict], where: dict) -> None:
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


def find(rows: list[dict], **wanted) -> dict | None:
    """The first measured row with these values."""
    for row in rows:
        if row["status"] == "ok" and all(row[key] == value for key, value in wanted.items()):
            return row
    return None


def step_table(rows: list[dict], title: str) -> Table:
    """One line per case and dtype: ours, and (x ...) how many times longer each baseline takes."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    ratios = [f"x {name.removeprefix('torch ')}" for name in BASELINES]
    for head in ("case", "dtype"):
        table.add_column(head, no_wrap=True)
    for head in ("tensors", "elements", *STEP_HEADS, *ratios):
        table.add_column(head, justify="right", no_wrap=True)
    for row in (row for row in rows if row["provider"] == OURS and row["status"] == "ok"):
        same = {"case": row["case"], "dtype": row["dtype"]}
        baselines = [find(rows, provider=name, **same) for name in BASELINES]
        table.add_row(
            *(row["case"], row["dtype"]),
            *(f"{row['tensors']:,}", human(row["elements"])),
            microseconds(row["us_p50"]),
            f"{microseconds(row['us_p20'])} - {microseconds(row['us_p80'])}",
            f"{row['gb_per_s']:.1f}",
            f"{row['stream_share']:.0%}",
            f"{row['allocations']}",
            f"{row['max_abs_error']:.0e}",
            *(f"{base['ours_speedup']:.2f}" if base else "void" for base in baselines),
        )
    return table


def microseconds(time: float) -> str:
    """A time with as many digits as it deserves."""
    return f"{time:,.1f}" if time < 1000 else f"{time:,.0f}"


def human(number: float) -> str:
    """Three digits and a decimal prefix."""
    for prefix in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g}G"


def host_table(rows: list[dict]) -> Table:
    """A line for each provider: time at each number of tensors, and the fitted line."""
    title = "Time of a step over one-element tensors, µs"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    counts = list(dict.fromkeys(row["tensors"] for row in rows))
    table.add_column("provider")
    for head in (*map(str, counts), "ns a tensor", "+ µs"):
        table.add_column(head, justify="right")
    for name in dict.fromkeys(row["provider"] for row in rows):
        mine = {row["tensors"]: row for row in rows if row["provider"] == name}
        times = [microseconds(mine[n]["us_p50"]) if n in mine else "" for n in counts]
        line = next(iter(mine.values()))
        table.add_row(name, *times, f"{line['ns_per_tensor']:,.1f}", f"{line['intercept_us']:.1f}")
    return table


def memory_table(rows: list[dict]) -> Table:
    """A line for each provider."""
    title = f"RAM a tensor beyond 4 bytes an element, {rows[0]['tensors']:,} tensors"
    table = Table("provider", "bytes", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(row["provider"], f"{row['bytes_per_tensor']:,.0f}")
    return table


def step_bars(rows: list[dict]) -> list[tuple]:
    """(what, needed, measured, met) for the bars on steps whose rows were measured."""
    bars = []
    for case, dtype, baseline, least in RATIO_BARS:
        row = find(rows, case=case, dtype=dtype, provider=baseline)
        got = row["ours_speedup"] if row else nan
        measured = f"{got:.2f}" if row else "not measured"
        met = got >= least if row else None
        bars.append((f"{case}, {baseline} / ours", f">= {least:g}", measured, met))
    for row in rows:
        if row["case"] in BAR_CASES and row.get("fp32_over_bf16"):
            got = row["fp32_over_bf16"]
            what = f"{row['case']}, bf16 / fp32 in elements a second"
            bars.append((what, ">= 1", f"{got:.2f}", got >= 1))
    worst = [r["allocations"] for r in rows if r["provider"] == OURS and r["status"] == "ok"]
    if worst:
        bars.append(("tensor allocations in a step", "0", str(max(worst)), max(worst) == 0))
    return bars


def host_bars(rows: list[dict]) -> list[tuple]:
    """The bars on host time: the slope, and the number of tensors where time is tightest."""
    ours = [row for row in rows if row["provider"].startswith(OURS) and row["status"] == "ok"]
    slopes = {row["provider"]: row["ns_per_tensor"] for row in ours}
    needed = f"<= {HOST_BAR_NS:g} ns a tensor"
    bars = [
        (f"{name}, fitted slope", needed, f"{slope:.1f} ns", slope <= HOST_BAR_NS)
        for name, slope in slopes.items()
    ]
    for name in slopes:
        points = [row for row in ours if row["provider"] == name]
        worst = max(points, key=lambda row: row["us_p50"] / host_bar(row["tensors"]))
        allowed, got = host_bar(worst["tensors"]), worst["us_p50"]
        what = f"{name}, {worst['tensors']} tensors"
        bars.append((what, f"<= {allowed:.1f} µs", f"{got:.1f} µs", got <= allowed))
    return bars


def host_bar(tensors: int) -> float:
    """Microseconds that a step over `tensors` tiny tensors may take."""
    return HOST_BAR_US + HOST_BAR_NS * 1e-3 * tensors


def memory_bars(rows: list[dict]) -> list[tuple]:
    """The bar on bytes a tensor beyond flat fp32 state."""
    measured = {row["provider"]: row["bytes_per_tensor"] for row in rows}
    got, entry = measured[OURS], measured[DICT_ONLY]
    needed = f"<= {STATE_BAR_BYTES}"
    return [
        ("bytes a tensor beyond 4 an element", needed, f"{got:.0f}", got <= STATE_BAR_BYTES),
        (
            f"the same without {DICT_ONLY} in optimizer.state",
            needed,
            f"{got - entry:.0f}",
            got - entry <= STATE_BAR_BYTES,
        ),
    ]


def print_bars(console: Console, bars: list[tuple]) -> None:
    """The bars as met or missed."""
    table = Table(title="Bars", title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("what", "needed", "measured", ""):
        table.add_column(head)
    words = {True: "[green]met", False: "[red]MISSED", None: ""}
    for what, needed, measured, met in bars:
        table.add_row(what, needed, measured, words[met])
    console.print(table)

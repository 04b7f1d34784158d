"""Compare fused_momentum with torch.optim.SGD on this machine.

    python bench/run.py [--cases resnet50 1x64M] [--dtype float32 bfloat16] [--seconds 270]

Prints tables, writes CSV files and figures to bench/results/<device>/. No number is printed or
written for a case before its correctness gate (bench/gate.py) has passed.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

# For `bench`; last, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import figures, host, memory, report
from bench.budget import Budget
from bench.cases import CASES, numel
from bench.gate import GateError
from bench.providers import BASELINES, OURS, bytes_needed
from bench.step import heading, run_case
from bench.stream import Stream
from bench.timing import MIN_ROUNDS

MARGIN = 1.15  # the interpreter, gate samples, the allocator's rounding
QUIET = 0.05  # share of the processors that others may use in a clean run
SHARES = {"step": 0.75, "host": 0.1, "memory": 0.1}  # of the time budget


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--backend", default="auto", help="back-end of ours (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=270, help="time budget of the whole run")
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench" / "results")
    return parser.parse_args()


def console() -> Console:
    """The screen; wide enough for the table where output goes to a file."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=140)


def too_large(elements: int, dtypes: list[torch.dtype], device: torch.device) -> str:
    """Why a case does not fit in memory, or an empty string."""
    need = MARGIN * bytes_needed(elements, dtypes, (OURS, *BASELINES))
    have = memory.available(device)
    if need <= have:
        return ""
    return f"skipped: needs {need / 2**30:.1f} GiB, {have / 2**30:.1f} GiB are available"


def choose(
    elements: int, tensors: int, dtypes: list, device: torch.device, budget: Budget
) -> tuple[list, str]:
    """The first dtypes that can run together, and why not all can."""
    reason = budget.too_long(elements, tensors)
    if reason:
        return [], reason
    reason = too_large(elements, dtypes, device)
    running = list(dtypes)
    while running and too_large(elements, running, device):
        running.pop()
    return running, reason


def step_part(options, device: torch.device, seconds: float) -> tuple[list[dict], list[tuple]]:
    """The chosen cases, in the order of `CASES`."""
    dtypes = [getattr(torch, name) for name in options.dtype]
    names = [name for name in CASES if name in options.cases]
    stream, rows = Stream(device), []
    budget = Budget(seconds, len(names))
    bar = tqdm(names, unit="case", dynamic_ncols=True)
    for name in bar:
        bar.set_description(f"{name:>10}")
        shapes, share = CASES[name](), budget.take()
        elements = numel(shapes)
        running, reason = choose(elements, len(shapes), dtypes, device, budget)
        rows += [heading(name, shapes, left, OURS, reason) for left in dtypes[len(running) :]]
        if not running:
            continue
        begin, ticks = time.monotonic(), []

        def tick(ticks=ticks) -> None:
            ticks.append(time.monotonic())
            bar.set_postfix_str(f"round {len(ticks)}")

        deadline = begin + share
        rows += run_case(name, shapes, running, device, stream, deadline, options.backend, tick)
        budget.learn(elements, len(shapes), ticks[MIN_ROUNDS - 1] - begin)
    title = f"Step of ours, and how many times longer torch takes; stream by {stream.how}"
    console().print(report.step_table(rows, title))
    for row in (row for row in rows if row["status"] != "ok"):
        console().print(f"{row['case']}, {row['dtype']}, {row['provider']}: {row['status']}")
    return rows, report.step_bars(rows)


def host_part(options, device: torch.device, seconds: float) -> tuple[list[dict], list[tuple]]:
    """Time against the number of tensors."""
    with tqdm(unit="round", desc="host", dynamic_ncols=True) as bar:
        rows = host.run_host(device, seconds, options.backend, bar.update)
    console().print(report.host_table(rows))
    return rows, report.host_bars(rows)


def memory_part(options, device: torch.device, seconds: float) -> tuple[list[dict], list[tuple]]:
    """Memory a tensor beyond flat state; on the host whatever the device."""
    bar = tqdm(memory.PROVIDERS, desc="memory", unit="provider", dynamic_ncols=True)
    rows = [memory.bytes_per_tensor(provider) for provider in bar]
    console().print(report.memory_table(rows))
    return rows, report.memory_bars(rows)


PARTS = {"step": step_part, "host": host_part, "memory": memory_part}


def main() -> int:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    where, tables, bars = report.environment(device), {}, []
    screen, load = console(), report.Load()
    screen.print(", ".join(f"{key} {value}" for key, value in where.items()), highlight=False)
    try:
        for part in options.parts:
            seconds = options.seconds * SHARES[part]
            tables[part], reached = PARTS[part](options, device, seconds)
            bars += reached
    except GateError as error:
        screen.print(f"[red]correctness gate: {error}; nothing is written")
        return 1
    where["busy_elsewhere"] = load.share()
    folder = options.out / report.slug(where["device"])
    for part, rows in tables.items():
        report.write_csv(folder / f"{part}.csv", rows, where)
    report.print_bars(screen, bars)
    if where["busy_elsewhere"] != "unknown" and where["busy_elsewhere"] > QUIET:
        share = f"{where['busy_elsewhere']:.0%}"
        screen.print(f"[yellow]other processes used {share} of the processors: not a clean run")
    screen.print(f"written: {folder}", *(path.name for path in figures.draw(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compare fused_momentum with what else a user could take, on this machine.

    python bench/run.py [--rule sgd] [--cases resnet50 1x64M] [--dtype float32] [--peers optimi]

Prints tables, writes CSV files and figures to bench/results/<device>/. No number is printed or
written for a case before its correctness gate (bench/gate.py) has passed. Peers that are not
installed are skipped and say so; pip install --no-deps torch-optimi heavyball opt-einsum
pytorch_optimizer sgd-sai leaves torch as it is. Each of apex, transformer_engine, bitsandbytes and
flashoptim needs a GPU, or an installation by its own rules.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

# For `bench`; last, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import bars, memory, providers, records, report, size, train
from bench.budget import Budget
from bench.cases import CASES, numel
from bench.gate import GateError
from bench.providers import RULES, Provider
from bench.step import Race, heading
from bench.stream import Stream

MARGIN, SPARE = 1.04, 2**30  # the interpreter, gate samples, the allocator's rounding
QUIET = 0.05  # share of the processors that others may use in a clean run
# Of the time budget. Size comes first: its thousands of tiny tensors then lie as in a process that
# begins with its model, not in the holes that the other parts have left.
SHARES = {"size": 0.15, "step": 0.5, "train": 0.15, "memory": 0.1}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--rule", nargs="+", choices=RULES, default=list(RULES), metavar="RULE")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--backend", default="auto", help="back-end of ours (default: auto)")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="default: all; none: no names")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=200, help="time budget of the whole run")
    parser.add_argument("--out", type=Path, default=records.RESULTS)
    return parser.parse_args()


def too_large(shapes, dtypes: list[torch.dtype], running: list[Provider], device) -> str:
    """Why a case does not fit in memory, or an empty string."""
    need = MARGIN * providers.bytes_needed(numel(shapes), dtypes, running) + SPARE
    have = memory.available(device)
    if need <= have:
        return ""
    return f"skipped: needs {need / 2**30:.1f} GiB, {have / 2**30:.1f} GiB are available"


def choose(shapes, dtypes: list, race: Race, budget: Budget) -> tuple[list, list, str]:
    """The first dtypes and providers that can run together, and why not all can."""
    dtypes = list(dtypes)
    running, reason = budget.fitting(race.running(), shapes, len(dtypes))
    if not running:
        return [], running, reason
    while late := too_large(shapes, dtypes, running, race.device):
        reason = late
        if len(dtypes) > 1:
            dtypes.pop()
        elif len(running) > len(race.rule.ours):
            running.pop()
        else:
            return [], running, reason
    return dtypes, running, reason


class Run:
    """One run of the bench: what it was asked for, and the tables that it has made."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.tables = options, {}
        cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self.where = records.environment(self.device)
        self.folder = options.out / records.slug(self.where["device"])
        self.stream = Stream(self.device)

    def step(self, seconds: float) -> None:
        """The cases of each rule."""
        shares = {name: RULES[name].share for name in self.options.rule}
        for name, share in shares.items():
            self.tables[f"step_{name}"] = self.rule(name, seconds * share / sum(shares.values()))

    def rule(self, name: str, seconds: float) -> list[dict]:
        """The chosen cases of a rule, in the order of the rule or of `CASES`."""
        rule, asked = RULES[name], self.options
        dtypes = [getattr(torch, dtype) for dtype in asked.dtype or rule.dtypes]
        cases = [case for case in rule.cases or CASES if case in (asked.cases or CASES)]
        chosen = providers.chosen(rule, asked.peers)
        race = Race(rule, chosen, self.device, self.stream, asked.backend)
        budget, rows = Budget(seconds, len(cases)), []
        bar = tqdm(cases, unit="case", dynamic_ncols=True)
        for case in bar:
            bar.set_description(f"{name}, {case:>10}")
            shapes = CASES[case]()
            fit, running, reason = choose(shapes, dtypes, race, budget)
            left = [dtype for dtype in dtypes if dtype not in fit]
            rows += [heading((case, shapes), dtype, race.ours, reason) for dtype in left]
            if fit:
                outside = {p.name: reason for p in race.running() if p not in running}
                rows += race.run((case, shapes), fit, budget, outside, bar.refresh)
            else:
                budget.take()
        title = f"{name}: a step of ours; stream by {self.stream.how}"
        if any(row["status"] == "ok" for row in rows):
            print(report.step_table(rows, race.ours, title))
            print(report.ratio_table(rows, race.ours))
        reasons = {
            f"{r['provider']}: {r['status']}": r["case"] for r in rows if r["status"] != "ok"
        }
        for reason, case in reasons.items():
            print(f"{case}, {reason}")
        return rows

    def size(self, seconds: float) -> None:
        """Time against the number of tensors and of parameters."""
        asked = self.options
        with tqdm(unit="round", desc="size", dynamic_ncols=True) as bar:
            rows = size.run(
                self.device, self.stream, seconds, asked.backend, asked.peers, bar.update
            )
        for sweep in size.SWEEPS:
            print(report.size_table(rows, sweep.name))
        self.tables["size"] = rows

    def train(self, seconds: float) -> None:
        """Whole training steps."""
        with tqdm(unit="round", desc="train", dynamic_ncols=True) as bar:
            self.tables["train"], self.tables["curves"] = train.run(
                self.device, seconds, bar.update
            )
        print(report.train_table(self.tables["train"]))

    def memory(self, seconds: float) -> None:
        """Memory of each optimizer on the device, and of each tensor on the host."""
        with tqdm(unit="mode", desc="memory", dynamic_ncols=True) as bar:
            rows = memory.mode_rows(self.options, self.device, seconds / 2, bar.update)
        bar = tqdm(memory.PER_TENSOR, desc="memory of a tensor", unit="provider")
        per_tensor = [memory.bytes_per_tensor(provider) for provider in bar]
        print(report.memory_table(rows))
        print(report.per_tensor_table(per_tensor))
        self.tables |= {"memory": rows, "per_tensor": per_tensor}

    def everything(self) -> None:
        """All parts, then the files."""
        what = ", ".join(f"{key} {value}" for key, value in self.where.items())
        print(what)
        load, rows = records.Load(), []
        for part in self.options.parts:
            begin = time.monotonic()
            getattr(self, part)(self.options.seconds * SHARES[part])
            seconds = time.monotonic() - begin
            rows.append({"part": part, "seconds": seconds, "budget_seconds": self.options.seconds})
        if set(self.options.parts) == set(SHARES):
            self.tables["run"] = rows
        self.where["busy_elsewhere"] = load.share()
        for name, table in self.tables.items():
            records.write(self.folder / f"{name}.csv", table, self.where)


def draw(results: records.Results) -> str:
    """Draw the figures; what to say of them."""
    try:
        from bench import figures
    except ModuleNotFoundError as error:
        return f"no figures: {error}; `make figures` draws them from the CSV files"
    return " ".join(path.name for path in figures.draw(results))


def main() -> int:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(options)
    try:
        run.everything()
    except GateError as error:
        print(f"correctness gate: {error}; nothing is written")
        return 1
    results = records.Results(run.folder)
    print(report.bars_table(list(bars.judge(results))))
    busy = run.where["busy_elsewhere"]
    if busy != "unknown" and busy > QUIET:
        print(f"others used {busy:.0%} of the processors: not a clean run")
    print("written:", run.folder, draw(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

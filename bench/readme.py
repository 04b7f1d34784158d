"""Writes the table of README.md from the committed CSVs, between its two markers; measures nothing.

python bench/readme.py [bench/results/<device>]
"""

import csv
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.providers import BASELINES, OURS
from bench.report import ROOT, human, microseconds

BEGIN, END = "<!-- bench/readme.py: begin -->", "<!-- bench/readme.py: end -->"
RESULTS = ROOT / "bench" / "results"


def read(path: Path) -> list[dict]:
    """Rows of a CSV, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(folder: Path) -> str:
    """The Markdown between the markers: a line per measured case and dtype of ours."""
    rows = [row for row in read(folder / "step.csv") if row["status"] == "ok"]
    ratios = " | ".join(f"{name} takes" for name in BASELINES)
    lines = [
        f"| model | dtype | tensors | elements | `FusedSGD` step | of the stream rate | {ratios} |",
        "|---|---|--:|--:|--:|--:|" + "--:|" * len(BASELINES),
    ]
    for row in (row for row in rows if row["provider"] == OURS):
        cells = [row["case"], row["dtype"], row["tensors"], human(float(row["elements"]))]
        cells += [f"{microseconds(float(row['us_p50']))} µs", f"{float(row['stream_share']):.0%}"]
        for name in BASELINES:
            same = {"case": row["case"], "dtype": row["dtype"], "provider": name}
            base = [r for r in rows if all(r[k] == v for k, v in same.items())]
            cells.append(f"{float(base[0]['ours_speedup']):.3g} x" if base else "wrong result")
        lines.append(f"| {' | '.join(cells)} |")
    ours = next(row for row in read(folder / "host.csv") if row["provider"].startswith(OURS))
    where = rows[0]
    source = folder.resolve().relative_to(ROOT)
    lines += [
        "",
        f"Cost of a tensor besides its elements: {float(ours['ns_per_tensor']):.0f} ns, plus "
        f"{float(ours['intercept_us']):.1f} µs a step (at commit {ours['commit']}).",
        "",
        f"Measured by `make bench` on {where['device']}, {where['threads']} threads, torch "
        f"{where['torch']}, at commit {where['commit']} on {where['date']}; all rows in "
        f"[{source}]({source}).",
    ]
    return "\n".join(lines)


def insert(text: str, made: str) -> str:
    """README text with what stands between the markers replaced."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Rewrite README.md."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else next(RESULTS.glob("*/step.csv")).parent
    readme = ROOT / "README.md"
    readme.write_text(insert(readme.read_text(), table(folder)))


if __name__ == "__main__":
    main()

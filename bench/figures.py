"""Figures from the CSV files of a results folder; measures nothing.

python bench/figures.py bench/results/<device>
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Grey print: providers differ in lightness, hatch and marker, not in hue alone.
STYLES = {
    "ours": ("#08306b", "", "o"),
    "torch fused": ("#6baed6", "//", "s"),
    "torch foreach": ("#c7c7c7", "..", "^"),
    "torch for-loop": ("#f5f5f5", "xx", "v"),
}


def read(path: Path) -> list[dict]:
    """Rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def caption(row: dict) -> str:
    """Where and with what the figure was measured."""
    device = f"{row['device']}, {row['threads']} threads"
    return f"{device}, torch {row['torch']}, commit {row['commit']}, {row['date']}"


def bars(axis, rows: list[dict], cases: list[str], column: str, dtype: str) -> None:
    """Grouped bars of `column`, a group for each case; an absent bar is a void provider."""
    width = 0.8 / len(STYLES)
    for place, (provider, (color, hatch, _)) in enumerate(STYLES.items()):
        found = {
            row["case"]: float(row[column])
            for row in rows
            if row["provider"] == provider and row["dtype"] == dtype and row[column]
        }
        at = [i + (place - 1.5) * width for i, case in enumerate(cases) if case in found]
        heights = [found[case] for case in cases if case in found]
        axis.bar(at, heights, width, color=color, hatch=hatch, edgecolor="black", label=provider)
    axis.set_xticks(range(len(cases)), cases, rotation=30, ha="right")
    axis.grid(axis="y", alpha=0.4)
    axis.set_axisbelow(True)


def step_figure(folder: Path) -> Path:
    """step.png: time of a step, and bytes moved a second, for each case and dtype."""
    rows = [row for row in read(folder / "step.csv") if row["status"] == "ok"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(
        2, len(dtypes), figsize=(7.5 * len(dtypes), 8), squeeze=False, sharey="row"
    )
    for column, dtype in enumerate(dtypes):
        here = [row for row in rows if row["dtype"] == dtype]
        cases = list(dict.fromkeys(row["case"] for row in here))
        times, rates = axes[:, column]
        bars(times, here, cases, "us_p50", dtype)
        times.set(yscale="log", title=f"{dtype}: time of a step, µs (lower is better)")
        bars(rates, here, cases, "gb_per_s", dtype)
        rates.set_title(f"{dtype}: bytes that must move / time, GB/s (higher is better)")
        ceilings = {row["case"]: float(row["stream_gb_per_s"]) for row in here}
        for place, case in enumerate(cases):
            label = "3-read 2-write stream, same run" if place == 0 else None
            edges = place - 0.45, place + 0.45
            rates.hlines(ceilings[case], *edges, "black", "dashed", label=label)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels))
    return save(figure, folder / "step.png", rows[0])


def host_figure(folder: Path) -> Path:
    """host.png: time of a step against the number of one-element tensors."""
    rows = read(folder / "host.csv")
    figure, axis = plt.subplots(figsize=(7.5, 5))
    for name in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == name]
        color, _, marker = STYLES[name.removesuffix(", new grads")]
        axis.plot(
            [int(row["tensors"]) for row in mine],
            [float(row["us_p50"]) for row in mine],
            marker=marker,
            color="black" if color == "#f5f5f5" else color,
            linestyle=":" if name.endswith("new grads") else "-",
            label=f"{name}: {float(mine[0]['ns_per_tensor']):,.0f} ns a tensor",
        )
    axis.set(xscale="log", yscale="log", xlabel="tensors of one element", ylabel="µs a step")
    axis.grid(alpha=0.4)
    axis.legend()
    return save(figure, folder / "host.png", rows[0])


def save(figure, path: Path, row: dict) -> Path:
    """Write the figure with its caption."""
    figure.text(0.01, 0.005, caption(row), fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 0.96))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


FIGURES = {"step.csv": step_figure, "host.csv": host_figure}


def draw(folder: Path) -> list[Path]:
    """Draw every figure whose CSV file is in `folder`."""
    return [make(folder) for name, make in FIGURES.items() if (folder / name).exists()]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for written in draw(Path(argument)):
            print(written)

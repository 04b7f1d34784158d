"""Figures from the CSV files of the results folders; measures nothing.

python -m bench.figures [bench/results/<device> ...]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.providers import COMPILED, FOR_LOOP, FOREACH, FUSED, HEAVYBALL, OURS
from bench.records import RESULTS, Results, names
from bench.train import PHASES

# Grey print: providers differ in lightness, hatch, marker and line, not in hue alone.
STYLES = {
    OURS: ("#08306b", "", "o", "-"),
    FUSED: ("#6baed6", "//", "s", "--"),
    FOREACH: ("#bdbdbd", "..", "^", "-."),
    FOR_LOOP: ("#f0f0f0", "xx", "v", ":"),
    COMPILED: ("#74c476", "\\\\", "D", "--"),
    "optimi": ("#fdae6b", "--", "P", "-."),
    "pytorch_optimizer": ("#9e9ac8", "||", "X", ":"),
    HEAVYBALL: ("#e7969c", "++", "*", "--"),
}
OTHERS = [("#525252", "oo", "<", ":"), ("#d9f0a3", "**", ">", "-."), ("#c49c94", "\\", "p", "--")]


def style(name: str) -> tuple:
    """Colour, hatch, marker and line of a provider."""
    base = name.removesuffix(", new grads")
    if base in STYLES:
        return STYLES[base]
    return OTHERS[sum(map(ord, base)) % len(OTHERS)]


def line_color(name: str) -> str:
    """A colour that a thin line can have on white."""
    color = style(name)[0]
    return "black" if color == "#f0f0f0" else color


def bars(axis, rows: list[dict], groups: list[str], column: str, by: str = "case") -> None:
    """Grouped bars of `column`, a group for each case; an absent bar was not measured."""
    providers = names(rows, "provider")
    width = 0.85 / len(providers)
    for place, name in enumerate(providers):
        found = {row[by]: row[column] for row in rows if row["provider"] == name}
        offset = (place - (len(providers) - 1) / 2) * width
        at = [i + offset for i, group in enumerate(groups) if group in found]
        heights = [found[group] for group in groups if group in found]
        color, hatch, *_ = style(name)
        axis.bar(at, heights, width, color=color, hatch=hatch, edgecolor="black", label=name)
    axis.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axis.grid(axis="y", alpha=0.4)
    axis.set_axisbelow(True)


def step_figure(results: Results, table: str):
    """Time of a step, and bytes moved a second, for each case and dtype."""
    rows = results.rows(table)
    dtypes = names(rows, "dtype")
    size = (9 * len(dtypes), 9)
    figure, axes = plt.subplots(2, len(dtypes), figsize=size, squeeze=False, sharey="row")
    for column, dtype in enumerate(dtypes):
        here = [row for row in rows if row["dtype"] == dtype]
        cases = names(here, "case")
        times, rates = axes[:, column]
        bars(times, here, cases, "us_p50")
        times.set(yscale="log", title=f"{dtype}: time of a step, µs (lower is better)")
        bars(rates, here, cases, "gb_per_s")
        rates.set_title(f"{dtype}: bytes that must move / time, GB/s (higher is better)")
        ceilings = {row["case"]: row["stream_gb_per_s"] for row in here}
        for place, case in enumerate(cases):
            label = "3-read 2-write stream, same run" if place == 0 else None
            edges = place - 0.45, place + 0.45
            rates.hlines(ceilings[case], *edges, "black", "dashed", label=label)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=min(len(labels), 5))
    return figure, rows[0]


def lines(axis, rows: list[dict], x: str, y: str, label) -> None:
    """A line for each provider."""
    for name in names(rows, "provider"):
        mine = [row for row in rows if row["provider"] == name and row.get(y, "") != ""]
        if not mine:
            continue
        new = name.endswith("new grads")
        _, _, marker, dash = style(name)
        axis.plot(
            [row[x] for row in mine],
            [row[y] for row in mine],
            marker=marker,
            color=line_color(name),
            linestyle=(0, (1, 2)) if new else dash,
            markerfacecolor="white" if new else None,
            label=label(name, mine[0]),
        )
    axis.set(xscale="log", yscale="log", xlabel=x)
    axis.grid(alpha=0.4)
    axis.legend(fontsize=8)


def slope(name: str, row: dict) -> str:
    """A provider and its fitted cost."""
    if row.get("ns_per_unit", "") == "":
        return name
    return f"{name}: {row['ns_per_unit']:,.3g} ns per {row['unit'].removesuffix('s')}"


def size_figure(results: Results):
    """Time against the number of tensors and of parameters; launches where a GPU counted them."""
    sweeps = names(results.rows("size"), "sweep")
    counted = any(row.get("kernels", "") != "" for row in results.rows("size"))
    figure, axes = plt.subplots(2, 2, figsize=(16, 12))
    for axis, sweep in zip(axes.flat, sweeps, strict=False):
        rows = results.rows("size", sweep=sweep)
        lines(axis, rows, rows[0]["unit"], "us_p50", slope)
        axis.set(title=sweep, ylabel="µs a step")
    last = axes[1, 1]
    if counted:
        lines(last, results.rows("size", sweep="fixed total"), "tensors", "kernels", plain)
        last.set(title="kernels a step", ylabel="kernels")
    else:
        lines(last, results.rows("size", sweep="fixed total"), "tensors", "host_us_p50", plain)
        last.set(title="fixed total: until the call returns", ylabel="µs")
    return figure, results.rows("size")[0]


def plain(name: str, row: dict) -> str:
    """A provider's name."""
    return name


def bandwidth_figure(results: Results):
    """Bytes moved a second against the number of parameters."""
    rows = results.rows("size", sweep="fixed count")
    figure, axis = plt.subplots(figsize=(9, 6))
    lines(axis, rows, "elements", "gb_per_s", plain)
    ours = [row for row in rows if row["provider"] == OURS]
    points = [row["elements"] for row in ours], [row["stream_gb_per_s"] for row in ours]
    axis.plot(*points, "k--", label="3-read 2-write stream, same run")
    axis.set(title=f"{ours[0]['tensors']} tensors, momentum, fp32", ylabel="GB/s")
    axis.legend(fontsize=8)
    return figure, rows[0]


def train_figure(results: Results):
    """Where the time of a training step goes."""
    rows = results.rows("train")
    groups = list(dict.fromkeys((row["model"], row["mode"]) for row in rows))
    figure, axes = plt.subplots(1, len(groups), figsize=(7 * len(groups), 6), squeeze=False)
    shades = ("#f0f0f0", "#bdbdbd", "#08306b", "#6baed6")
    for axis, (model, mode) in zip(axes[0], groups, strict=True):
        mine = [row for row in rows if (row["model"], row["mode"]) == (model, mode)]
        labels, bottom = [row["optimizer"] for row in mine], [0.0] * len(mine)
        for phase, shade, hatch in zip(PHASES, shades, ("", "..", "", "//"), strict=True):
            heights = [row[f"{phase}_us"] / 1e3 for row in mine]
            axis.bar(
                labels,
                heights,
                0.7,
                bottom,
                color=shade,
                hatch=hatch,
                edgecolor="black",
                label=phase,
            )
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        for place, (row, top) in enumerate(zip(mine, bottom, strict=True)):
            axis.text(place, top, f"step {row['step_share']:.1%}", ha="center", va="bottom")
        axis.set(title=f"{model}, {mode}", ylabel="ms a training step")
        axis.tick_params(axis="x", rotation=30)
        axis.legend()
    return figure, rows[0]


def curves_figure(results: Results):
    """Losses in training: ours lie on torch's."""
    rows = results.rows("curves")
    models = names(rows, "model")
    figure, axes = plt.subplots(1, len(models), figsize=(8 * len(models), 5), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        mine = [row | {"provider": row["optimizer"]} for row in rows if row["model"] == model]
        for name, width in ((FOREACH, 6), (OURS, 1.5)):
            curve = [(row["step"], row["loss"]) for row in mine if row["provider"] == name]
            axis.plot(*zip(*curve, strict=True), color=line_color(name), lw=width, label=name)
        axis.set(title=f"{model}: loss on batches seen over and over", xlabel="step")
        axis.grid(alpha=0.4)
        axis.legend()
    return figure, rows[0]


def memory_figure(results: Results):
    """Bytes a parameter: state held, and the peak of a step above it."""
    rows = results.rows("memory")
    labels = [", ".join(filter(None, (r["rule"], r["provider"], r["mode"]))) for r in rows]
    figure, axis = plt.subplots(figsize=(10, 0.32 * len(rows) + 1.5))
    extra = [max(row["peak_per_param"] - row["state_per_param"], 0) for row in rows]
    held = [row["state_per_param"] for row in rows]
    axis.barh(labels, held, color="#08306b", edgecolor="black", label="state")
    axis.barh(
        labels, extra, left=held, color="#f0f0f0", hatch="//", edgecolor="black", label="peak"
    )
    paper = [row["state_per_param_on_paper"] for row in rows]
    axis.plot(paper, labels, "k|", markersize=12, label="state on paper")
    axis.invert_yaxis()
    axis.set(title=f"{rows[0]['case']}: bytes a parameter besides p and g")
    axis.grid(axis="x", alpha=0.4)
    axis.legend()
    return figure, rows[0]


FIGURES = {
    "size": size_figure,
    "bandwidth": bandwidth_figure,
    "train": train_figure,
    "curves": curves_figure,
    "memory": memory_figure,
}


def save(figure, path: Path, row: dict) -> Path:
    """Write the figure with where and with what it was measured."""
    device = f"{row['device']}, {row['threads']} threads"
    caption = f"{device}, torch {row['torch']}, commit {row['commit']}, {row['date']}"
    figure.text(0.01, 0.005, caption, fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 0.94 if figure.legends else 1))
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
    return path


def draw(results: Results) -> list[Path]:
    """Draw every figure whose CSV file is in the folder."""
    written = []
    for table in results.step_tables:
        if results.rows(table):
            written.append(save(*step_named(results, table)))
    for name, make in FIGURES.items():
        if results.rows({"bandwidth": "size"}.get(name, name)):
            figure, row = make(results)
            written.append(save(figure, results.folder / f"{name}.png", row))
    return written


def step_named(results: Results, table: str) -> tuple:
    """A figure of steps, its file and a row of it."""
    figure, row = step_figure(results, table)
    return figure, results.folder / f"{table}.png", row


def main() -> None:
    """Draw the figures of the folders named, or of all."""
    folders = [Path(name) for name in sys.argv[1:]]
    for folder in folders or sorted({path.parent for path in RESULTS.glob("*/*.csv")}):
        for path in draw(Results(folder)):
            print(path)


if __name__ == "__main__":
    main()

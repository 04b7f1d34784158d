"""Writes bench/results/README.md and the table of README.md from the committed CSVs.

    python -m bench.summary

Measures nothing; every number is from a CSV file.
"""

from pathlib import Path

from bench import bars, instructions
from bench.providers import ADAMW, OURS, RULES
from bench.records import RESULTS, ROOT, Results, all_results, names
from bench.text import human, markdown, microseconds

BEGIN, END = "<!-- bench/summary.py: begin -->", "<!-- bench/summary.py: end -->"
SUMMARY = RESULTS / "README.md"
NO_GPU = "not measured: no GPU"
# Milliseconds of a step on one A100-80GB, in fp32: SGD-SaI and AdamW, both loops over the tensors.
# Xu et al. 2024 (arXiv 2412.11768), the figures of the authors' repository.
PUBLISHED = {
    "vit_s16": (12.4, 45),
    "gpt2_124m": (9.31, 13.42),
    "vit_h14": (54, 124),
    "gpt2_xl": (68, 138),
    "llama_7b": (180, 323),
}


# --- parts -----------------------------------------------------------------------------------


def where(row: dict) -> str:
    """Where and with what something was measured."""
    cuda = "" if row["cuda"] == "none" else f", CUDA {row['cuda']}"
    return (
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}{cuda}, at commit "
        f"{row['commit']} on {row['date']}"
    )


def bars_table(everything: list[Results]) -> str:
    """Every bar, with the figure of each device of its kind."""
    judged = {r.folder.name: {j.bar: j for j in bars.judge(r)} for r in everything}
    lines = []
    for bar in bars.BARS:
        found = [(name, by_bar[bar]) for name, by_bar in judged.items() if bar in by_bar]
        if not found:
            lines.append([str(bar.issue), bar.what, bar.needed, bar.device, NO_GPU, ""])
        for name, one in found:
            figure = one.figure or "not measured"
            word = one.word if one.met is not None else ""
            lines.append([str(bar.issue), bar.what, bar.needed, name, figure, word])
    heads = ["issue", "bar", "needed", "measured on", "figure", ""]
    return markdown(heads, lines, 6)


def step_table(results: Results, table: str) -> str:
    """A line for each measured case and dtype of ours; how long the others take beside it."""
    rows = results.tables[table]
    ours = RULES[table.removeprefix("step_")].ours[0].name
    others = [name for name in names(rows, "provider") if name != ours and ran(rows, name)]
    lines = []
    for row in results.rows(table, provider=ours):
        same = {r["provider"]: r for r in rows if all(r[k] == row[k] for k in ("case", "dtype"))}
        cells = [row["case"], row["dtype"], f"{row['tensors']:,}", human(row["elements"])]
        cells += [f"{microseconds(row['us_p50'])} µs", f"{row['stream_share']:.0%}"]
        lines.append(cells + [ratio_cell(same.get(name)) for name in others])
    heads = ["model", "dtype", "tensors", "elements", "ours", "of the stream", *others]
    return markdown(heads, lines, 2)


def ran(rows: list[dict], name: str) -> bool:
    """Whether a provider was tried in any case."""
    return any(r["provider"] == name and not r["status"].startswith("skipped") for r in rows)


def ratio_cell(row: dict | None) -> str:
    """How many times longer a provider takes than ours, or why that is not known."""
    if row is None or row["status"].startswith("skipped"):
        return "-"
    if row["status"].startswith("ok"):
        return f"{row['over_ours']:.3g} x"
    return "wrong result" if row["status"].startswith("void") else "refused"


def published_table(results: Results) -> str:
    """Steps of SGD-SaI and AdamW as published beside those measured here, in milliseconds."""
    lines = []
    for case, published in PUBLISHED.items():
        names = (OURS, "sgd-sai", ADAMW)
        rows = [results.row("step_sgd_sai", case=case, provider=name) for name in names]
        cells = [f"{row['us_p50'] / 1e3:.4g}" if row else "-" for row in rows]
        lines.append([case, *map(str, published), *cells])
    heads = ["ms a step", "SGD-SaI, A100, published", "AdamW, A100, published"]
    return markdown([*heads, "ours here", "sgd-sai here", "torch AdamW fused here"], lines)


def peers(results: Results, table: str) -> str:
    """Each peer with its version, or why it was not run."""
    found = {}
    for row in results.tables[table]:
        if row["provider"] not in found or row["version"]:
            found[row["provider"]] = row["version"] or row["status"]
    return "; ".join(f"{name}: {what}" for name, what in found.items())


def lines_table(results: Results) -> str:
    """The fitted cost of a tensor and of a parameter."""
    rows, lines = results.rows("size"), []
    for sweep in names(rows, "sweep"):
        for name in names([r for r in rows if r["sweep"] == sweep], "provider"):
            row = results.row("size", sweep=sweep, provider=name)
            if row.get("ns_per_unit", "") != "":
                unit = row["unit"].removesuffix("s")
                cost = f"{row['ns_per_unit']:.4g} ns per {unit}"
                lines.append([sweep, name, cost, f"{microseconds(row['intercept_us'])} µs"])
    return markdown(["sweep", "", "slope", "and a step"], lines, 2)


def train_table(results: Results) -> str:
    """Where the time of a training step goes."""
    heads = ["model", "mode", "optimizer", "forward µs", "backward µs", "step µs", "step's share"]
    lines = []
    for row in results.tables["train"]:
        line = [row["model"], row["mode"], row["optimizer"]]
        if row["status"] == "ok":
            line += [microseconds(row[f"{p}_us"]) for p in ("forward", "backward", "step")]
            line += [f"{row['step_share']:.1%}", f"{row['over_ours']:.3f}"]
            line.append(f"{row['last_loss']:.4g}")
        else:
            line += [row["status"], *[""] * 5]
        lines.append(line)
    return markdown([*heads, "x ours", "last loss"], lines, 3)


def memory_table(results: Results) -> str:
    """Bytes a parameter of each optimizer and mode."""
    lines = []
    for row in results.rows("memory"):
        head = [row["rule"], row["provider"], row["mode"]]
        paper = [str(row["state_per_param_on_paper"]), str(row["moved_per_param_on_paper"])]
        extra = row["step_extra_bytes"] / row["elements"]
        cells = [f"{row[key]:.3g}" for key in ("state_per_param", "peak_per_param")]
        lines.append([*head, *cells, f"{extra:.3g}", *paper])
    heads = ["rule", "", "mode", "state", "peak", "extra in a step"]
    return markdown([*heads, "state on paper", "moved on paper"], lines, 3)


# --- pages -----------------------------------------------------------------------------------


def section(results: Results) -> list[str]:
    """All that was measured on one device."""
    name = results.folder.name
    text = [f"## {results.where['device']}", "", f"Measured on {where(results.where)}."]
    for table in filter(results.rows, results.step_tables):
        rule = table.removeprefix("step_")
        text += ["", f"### {rule}: a step, and how long the others take beside it", ""]
        text += [step_table(results, table), "", f"{peers(results, table)}.", ""]
        if rule == "sgd_sai":
            text += [published_table(results), ""]
        text += [f"![{rule}]({name}/{table}.png)"]
    for table, title, make in (
        ("size", "Cost against size", lines_table),
        ("train", "A training step", train_table),
        ("memory", "Bytes a parameter", memory_table),
    ):
        if results.rows(table):
            text += ["", f"### {title}", "", make(results)]
    for path in sorted(results.folder.glob("*.png")):
        if path.stem not in results.step_tables:
            text += ["", f"![{path.stem}]({name}/{path.name})"]
    return text


def page(everything: list[Results]) -> str:
    """bench/results/README.md."""
    text = [
        "# Results",
        "",
        "Made by `python -m bench.summary` from the CSV files beside it; nothing is typed by hand.",
        "Other bars of the issues are tests: `make test`. What was expected, and what surprised: "
        "[notes.md](notes.md).",
        "",
        "## Bars",
        "",
        bars_table(everything),
        "",
        *instructions.section(),
    ]
    for results in everything:
        text += ["", *section(results)]
    return "\n".join(text) + "\n"


def readme_block(everything: list[Results]) -> str:
    """What stands between the markers of README.md: the first device's figure and table."""
    results = everything[0]
    source = results.folder.resolve().relative_to(ROOT)
    line = results.row("size", sweep="one element each", provider=OURS)
    text = [f"![Time of a step, ours and others']({source}/step_sgd.png)", ""]
    text += [step_table(results, "step_sgd"), ""]
    if line:
        cost = f"{line['ns_per_unit']:.0f} ns, plus {line['intercept_us']:.1f} µs a step"
        text += [f"Cost of a tensor besides its elements: {cost}.", ""]
    text += [f"{where(results.row('step_sgd'))}. All rows, every bar, and the other rules:"]
    text[-1] = f"Measured by `make bench` on {text[-1]}"
    text += ["[bench/results](bench/results/README.md)."]
    return "\n".join(text)


def insert(text: str, made: str) -> str:
    """README text with what stands between the markers replaced."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main(root: Path = ROOT) -> None:
    """Rewrite both files."""
    everything = all_results()
    SUMMARY.write_text(page(everything))
    readme = root / "README.md"
    readme.write_text(insert(readme.read_text(), readme_block(everything)))
    print(SUMMARY, readme, sep="\n")


if __name__ == "__main__":
    main()

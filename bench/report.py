"""Tables on the screen."""

from bench.bars import Judged
from bench.records import names
from bench.text import human, microseconds, plain

STEP_HEADS = (
    *("case", "dtype", "tensors", "elements", "µs", "p20 - p80", "host µs"),
    *("GB/s", "stream", "launches", "allocs", "state", "error"),
)


def step_table(rows: list[dict], ours: str, title: str) -> str:
    """A line for each case and dtype of ours."""
    lines = []
    for row in (row for row in rows if row["provider"] == ours and row["status"] == "ok"):
        lines.append(
            [
                *(row["case"], row["dtype"], f"{row['tensors']:,}", human(row["elements"])),
                microseconds(row["us_p50"]),
                f"{microseconds(row['us_p20'])} - {microseconds(row['us_p80'])}",
                microseconds(row["host_us_p50"]),
                f"{row['gb_per_s']:.1f}",
                f"{row['stream_share']:.0%}",
                str(row["kernels"] or row["launches"]),
                f"{row['allocations']}",
                f"{human(row['state_bytes'])}B",
                f"{row['max_abs_error']:.0e}",
            ]
        )
    return plain(title, list(STEP_HEADS), lines, 2)


def ratio_table(rows: list[dict], ours: str) -> str:
    """A line for each case and dtype: how many times longer each other provider takes."""
    tried = [row for row in rows if not row["status"].startswith("skipped")]
    others, lines = [name for name in names(tried, "provider") if name != ours], []
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in tried):
        same = [r for r in tried if (r["case"], r["dtype"]) == (case, dtype)]
        ratios = {row["provider"]: ratio_cell(row) for row in same}
        lines.append([case, dtype, *(ratios.get(name, "-") for name in others)])
    heads = ["case", "dtype", *(name.removeprefix("torch ") for name in others)]
    return plain("How many times longer than ours others take", heads, lines, 2)


def ratio_cell(row: dict) -> str:
    """How many times longer a provider takes, or in a word why that is not known."""
    if "over_ours" in row:
        return f"{row['over_ours']:.2f}"
    return row["status"].split(":")[0]


def size_table(rows: list[dict], sweep: str) -> str:
    """A line for each provider: time at each size, and the fitted line."""
    rows = [row for row in rows if row["sweep"] == sweep and "us_p50" in row]
    cases, lines = names(rows, "case"), []
    for name in names(rows, "provider"):
        mine = {row["case"]: row for row in rows if row["provider"] == name}
        line = next(iter(mine.values()))
        times = [microseconds(mine[case]["us_p50"]) if case in mine else "" for case in cases]
        fitted = ["", ""]
        if "ns_per_unit" in line:
            fitted = [f"{line['ns_per_unit']:.4g}", microseconds(line["intercept_us"])]
        lines.append([name, *times, *fitted])
    unit = rows[0]["unit"].removesuffix("s")
    return plain(f"{sweep}: µs a step", ["provider", *cases, f"ns per {unit}", "+ µs"], lines)


def train_table(rows: list[dict]) -> str:
    """A line for each loop."""
    lines = []
    for row in rows:
        head = [row["model"], row["mode"], row["optimizer"]]
        if row["status"] != "ok":
            lines.append([*head, row["status"]])
            continue
        phases = [
            microseconds(row[f"{p}_us"]) for p in ("forward", "backward", "step", "zero_grad")
        ]
        end = [f"{row['step_share']:.1%}", f"{row['over_ours']:.3f}", f"{row['last_loss']:.4f}"]
        lines.append([*head, *phases, microseconds(row["total_us"]), *end])
    heads = ["model", "mode", "optimizer", "forward", "backward", "step", "zero_grad", "total µs"]
    title = "A training step, µs"
    return plain(title, [*heads, "step's share", "over ours", "last loss"], lines, 3)


def memory_table(rows: list[dict]) -> str:
    """A line for each mode."""
    lines = []
    for row in rows:
        head = [row["rule"], row["provider"], row["mode"]]
        if row["status"] != "ok":
            lines.append([*head, row["status"]])
            continue
        keys = ("state_per_param", "state_per_param_on_paper", "peak_per_param")
        extra = row["step_extra_bytes"] / row["elements"]
        cells = [f"{row[key]:.3g}" for key in keys]
        lines.append([*head, *cells, f"{extra:.3g}", str(row["moved_per_param_on_paper"])])
    heads = ["rule", "provider", "mode", "state", "on paper", "peak", "extra in a step", "moved"]
    return plain(f"Bytes a parameter, {rows[0]['case']}", heads, lines, 3)


def per_tensor_table(rows: list[dict]) -> str:
    """A line for each provider."""
    lines = [[row["provider"], f"{row['bytes_per_tensor']:,.0f}"] for row in rows]
    title = f"RAM a tensor beyond 4 bytes an element, {rows[0]['tensors']:,} tensors"
    return plain(title, ["provider", "bytes"], lines)


def bars_table(judged: list[Judged]) -> str:
    """The bars as met or missed."""
    words = {True: "met", False: "MISSED"}
    lines = [
        [str(j.bar.issue), j.bar.what, j.bar.needed, j.figure, words[j.met]]
        for j in judged
        if j.met is not None
    ]
    return plain("Bars", ["issue", "what", "needed", "measured", ""], lines, 5)

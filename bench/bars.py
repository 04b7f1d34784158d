"""The bars of the project: what each issue asks for, and what the committed results say of it.

A bar is a row of `BARS`; its figure comes from the CSV files of one device and from nowhere else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.providers import COMPILED, FOR_LOOP, FOREACH, FUSED, OURS, OURS_SGD
from bench.records import Results
from bench.text import microseconds

CPU, GPU = "CPU", "GPU"
VARIANTS = (FUSED, FOREACH, FOR_LOOP, COMPILED)
SAI_SMALL, GPT2, LLAMA = "gpt2_124m_small", "gpt2_124m", "llama_7b"
Figure = tuple[str, bool | None] | None  # what was measured, and whether that meets the bar


@dataclass(frozen=True)
class Bar:
    """What an issue asks for, on a kind of device."""

    issue: int
    device: str
    what: str
    needed: str
    measure: Callable[[Results], Figure]


@dataclass(frozen=True)
class Judged:
    """A bar and its figure on one device."""

    bar: Bar
    figure: str
    met: bool | None

    @property
    def word(self) -> str:
        """How the bar stands."""
        return {True: "met", False: "**missed**", None: "not measured"}[self.met]


def judge(results: Results) -> Iterator[Judged]:
    """Every bar for the kind of device that these results are from."""
    for bar in BARS:
        if bar.device == (GPU if results.on_gpu else CPU):
            yield Judged(bar, *(bar.measure(results) or ("", None)))


# --- ways to measure -------------------------------------------------------------------------


def at_least(got: float | None, least: float, text: str = "{:.3g} x") -> Figure:
    """A figure that must reach `least`."""
    return None if got is None else (text.format(got), got >= least)


def at_most(got: float | None, most: float, text: str = "{:.3g}") -> Figure:
    """A figure that must not pass `most`."""
    return None if got is None else (text.format(got), got <= most)


def value(results: Results, table: str, column: str, **wanted) -> float | None:
    """The number in a column of a measured row."""
    row = results.row(table, **wanted)
    return None if row is None or row.get(column, "") == "" else row[column]


def faster(case: str, peer: str, least: float, rule="sgd", column="over_ours") -> Callable:
    """How many times longer a peer takes than ours, in fp32."""
    wanted = {"case": case, "provider": peer, "dtype": "float32"}
    return lambda results: at_least(value(results, f"step_{rule}", column, **wanted), least)


def ours(rule: str, case: str, column: str, provider: str = OURS, dtype="float32") -> Callable:
    """A number of a row of ours."""
    wanted = {"case": case, "provider": provider, "dtype": dtype}
    return lambda results: value(results, f"step_{rule}", column, **wanted)


def quotient(above: Callable, below: Callable) -> Callable:
    """Of two numbers; None where one was not measured."""

    def divide(results: Results) -> float | None:
        a, b = above(results), below(results)
        return None if a is None or b is None else a / b

    return divide


def most(number: Callable, limit: float, text: str = "{:.3g}") -> Callable:
    """A number that must not pass `limit`."""
    return lambda results: at_most(number(results), limit, text)


def least(number: Callable, limit: float, text: str = "{:.3g}") -> Callable:
    """A number that must reach `limit`."""
    return lambda results: at_least(number(results), limit, text)


def allocations(results: Results) -> Figure:
    """The most allocations in a steady step of ours, in any table."""
    rows = [
        r for t in results.step_tables for r in results.rows(t) if r["provider"].startswith(OURS)
    ]
    return at_most(max((r["allocations"] for r in rows), default=None), 0)


def host_line(results: Results) -> Figure:
    """The tightest point of 15 us + 30 ns a tensor, gradients new at each step or not."""
    sweep = results.rows("size", sweep="one element each")
    rows = [row for row in sweep if row["provider"].startswith(OURS)]
    if not rows:
        return None
    worst = max(rows, key=lambda row: row["us_p50"] / host_bar(row["tensors"]))
    allowed, got = host_bar(worst["tensors"]), worst["us_p50"]
    slopes = {row["provider"]: row["ns_per_unit"] for row in rows if row["ns_per_unit"]}
    lines = "; ".join(f"{name}: {slope:.0f} ns a tensor" for name, slope in slopes.items())
    missed = [row["tensors"] for row in rows if row["us_p50"] > host_bar(row["tensors"])]
    lines += f"; missed from {min(missed):,} on" if missed else ""
    text = f"{microseconds(got)} of {microseconds(allowed)} µs at {worst['tensors']:,} tensors"
    return f"{text} ({lines})", got <= allowed


def host_bar(tensors: int) -> float:
    """Microseconds that a step over `tensors` tiny tensors may take."""
    return 15.0 + 30e-3 * tensors


def per_tensor(results: Results) -> Figure:
    """Bytes a tensor beyond flat state; torch's dict and the view in it are counted apart."""
    rows = {row["provider"]: row["bytes_per_tensor"] for row in results.rows("per_tensor")}
    if OURS not in rows:
        return None
    entry = rows["a dict and a view"]
    text = f"{rows[OURS]:.0f}, of which {entry:.0f} are optimizer.state's own dict and view"
    return text, rows[OURS] - entry <= 200


def run_time(most: float) -> Callable:
    """The whole run of the bench, over its budget."""

    def measure(results: Results) -> Figure:
        rows = results.rows("run")
        if not rows:
            return None
        seconds, budget = sum(row["seconds"] for row in rows), rows[0]["budget_seconds"]
        return (
            f"{seconds / budget:.2f} ({seconds:.0f} s of {budget:.0f} s)",
            seconds <= most * budget,
        )

    return measure


def large_share(dtype: str, limit: float) -> Callable:
    """The worst share of the stream over the cases of 100M parameters and more."""

    def measure(results: Results) -> Figure:
        rows = results.rows("step_sgd", provider=OURS, dtype=dtype)
        large = [row for row in rows if row["elements"] >= 10**8]
        if not large:
            return None
        share, case = min((row["stream_share"], row["case"]) for row in large)
        above = ", above the stream: no ceiling" if share > 1.0 else ""
        return f"{share:.0%} ({case}){above}", None if above else share >= limit

    return measure


def fastest(cases: tuple[str, ...], columns=("over_ours", "host_over_ours")) -> Callable:
    """The closest that any torch variant comes, in device and host time; () means all cases."""

    def measure(results: Results) -> Figure:
        rows = [row for row in results.rows("step_sgd") if row["provider"] in VARIANTS]
        rows = [row for row in rows if not cases or row["case"] in cases]
        found = [(row[c], row) for row in rows for c in columns]
        if not found:
            return None
        ratio, row = min(found, key=lambda pair: pair[0])
        return f"{ratio:.3g} x ({row['provider']}, {row['case']}, {row['dtype']})", ratio > 1

    return measure


def kernels(results: Results) -> Figure:
    """The most kernels in a step of our SGD."""
    rows = [row["kernels"] for row in results.rows("step_sgd", provider=OURS)]
    return at_most(max(rows, default=None), 1)


def floor(results: Results) -> Figure:
    """Time on the device of 1000 x 1024 against twice the bandwidth floor and 5 us."""
    row = results.row("step_sgd", case="1000x1024", provider=OURS, dtype="float32")
    if row is None:
        return None
    allowed = 2 * row["bytes_moved"] / (row["stream_gb_per_s"] * 1e3) + 5
    return f"{row['kernel_us']:.1f} of {allowed:.1f} µs", row["kernel_us"] <= allowed


def state_against(peer: str, rule: str, case: str, limit: float) -> Callable:
    """State bytes of ours over those of a peer."""
    mine, other = (ours(rule, case, "state_bytes", name) for name in (OURS, peer))
    return most(quotient(mine, other), limit)


def first_step(results: Results) -> Figure:
    """The first step of SGD-SaI over a steady one: measuring included, state made before.

    Beside it what it is where the step also allocates the state, and that of our SGD.
    """
    names = (OURS, OURS_SGD)
    rows = [results.row("step_sgd_sai", case=GPT2, provider=name) for name in names]
    if None in rows or "" in [rows[0]["us_first_made"], *(row["us_first"] for row in rows)]:
        return None
    sai, plain = (row["us_first"] / row["us_p50"] for row in rows)
    made = rows[0]["us_first_made"] / rows[0]["us_p50"]
    text = f"{made:.3g} (where it allocates the state too: {sai:.3g}; FusedSGD: {plain:.3g})"
    return text, made <= 1.5


def paper_state(results: Results) -> Figure:
    """The worst difference between the state that AutoSGM holds and what its rule needs."""
    rows = [
        row["state_per_param"] / row["state_per_param_on_paper"] - 1
        for row in results.rows("memory", rule="autosgm")
        if row["provider"].startswith(OURS)
    ]
    return at_most(max(rows, default=None), 0.01, "{:+.2%}")


def curves(results: Results) -> Figure:
    """How far our loss is from torch's at worst, over the range of the losses.

    Of the first 20 steps: two runs that round differently move apart in time.
    """
    worst = None
    for model in {row["model"] for row in results.rows("curves")}:
        ours, torchs = (
            [r["loss"] for r in results.rows("curves", model=model, optimizer=name)][:20]
            for name in (OURS, FOREACH)
        )
        gaps = [abs(a - b) for a, b in zip(ours, torchs, strict=True)]
        gap = max(gaps) / (max(torchs) - min(torchs))
        worst = gap if worst is None else max(worst, gap)
    return at_most(worst, 0.01, "{:.2%}")


# --- the bars --------------------------------------------------------------------------------

BARS = (
    Bar(2, CPU, "300x64 against torch fused", "30 x", faster("300x64", FUSED, 30)),
    Bar(2, CPU, "3000x1024 against torch fused", "8 x", faster("3000x1024", FUSED, 8)),
    Bar(2, CPU, "ResNet-50 against torch fused", "1.1 x", faster("resnet50", FUSED, 1.1)),
    Bar(2, CPU, "1x64M against torch fused", "1 x", faster("1x64M", FUSED, 1)),
    *(
        Bar(
            2,
            CPU,
            f"{case}: elements a second in bf16 over fp32",
            "1",
            least(ours("sgd", case, "fp32_over_bf16", dtype="bfloat16"), 1),
        )
        for case in ("300x64", "3000x1024", "resnet50", "1x64M")
    ),
    Bar(2, CPU, "tensor allocations in a steady step", "0", allocations),
    Bar(2, CPU, "host cost of a step", "under 15 µs + 30 ns a tensor", host_line),
    Bar(2, CPU, "bytes a tensor beyond flat state", "under 200", per_tensor),
    Bar(
        2,
        CPU,
        "`make bench` over its budget (200 s unless told)",
        "5 minutes: 1.5",
        run_time(1.5),
    ),
    Bar(
        3,
        GPU,
        "fp32 momentum, 100M parameters and more",
        "92 % of the stream",
        large_share("float32", 0.92),
    ),
    Bar(
        3,
        GPU,
        "bf16 momentum, 100M parameters and more",
        "90 % of the stream",
        large_share("bfloat16", 0.9),
    ),
    Bar(
        3,
        GPU,
        "device time against every torch variant, every row",
        "faster",
        fastest((), ("over_ours",)),
    ),
    Bar(
        3,
        GPU,
        "1000x1024: host time against torch fused",
        "50 x",
        faster("1000x1024", FUSED, 50, column="host_over_ours"),
    ),
    Bar(3, GPU, "1000x1024: device time", "twice the floor + 5 µs", floor),
    Bar(
        3,
        GPU,
        "ResNet-50, GPT-2 124M, Llama-1B against every torch variant, host and device",
        "faster",
        fastest(("resnet50", GPT2, "llama_1b")),
    ),
    Bar(3, GPU, "kernels in a step", "1", kernels),
    Bar(
        4,
        CPU,
        "SGD-SaI, GPT-2's norms and biases, against sgd-sai",
        "10 x",
        faster(SAI_SMALL, "sgd-sai", 10, "sgd_sai"),
    ),
    Bar(
        4, CPU, "SGD-SaI, GPT-2 124M, against sgd-sai", "3 x", faster(GPT2, "sgd-sai", 3, "sgd_sai")
    ),
    Bar(4, CPU, "SGD-SaI, GPT-2 124M, first step over a steady one", "at most 1.5", first_step),
    Bar(
        4,
        GPU,
        "SGD-SaI, bytes a parameter",
        "20",
        most(quotient(ours("sgd_sai", GPT2, "bytes_moved"), ours("sgd_sai", GPT2, "elements")), 20),
    ),
    Bar(
        4,
        GPU,
        "SGD-SaI, GPT-2 124M, time over FusedSGD's",
        "at most 1.03",
        most(
            quotient(ours("sgd_sai", GPT2, "us_p50"), ours("sgd_sai", GPT2, "us_p50", OURS_SGD)),
            1.03,
        ),
    ),
    Bar(
        4,
        GPU,
        "SGD-SaI, GPT-2 124M, against sgd-sai",
        "10 x",
        faster(GPT2, "sgd-sai", 10, "sgd_sai"),
    ),
    Bar(
        4, GPU, "SGD-SaI, Llama-7B, against sgd-sai", "2 x", faster(LLAMA, "sgd-sai", 2, "sgd_sai")
    ),
    Bar(
        4,
        GPU,
        "SGD-SaI, state over AdamW's",
        "0.5",
        state_against("torch AdamW fused", "sgd_sai", GPT2, 0.501),
    ),
    Bar(
        5,
        CPU,
        "AutoSGM, ResNet-50, against torch AdamW fused",
        "1 x",
        faster("resnet50", "torch AdamW fused", 1, "autosgm"),
    ),
    Bar(
        5,
        CPU,
        "AutoSGM, 3000x1024, against torch AdamW fused",
        "5 x",
        faster("3000x1024", "torch AdamW fused", 5, "autosgm"),
    ),
    Bar(
        5,
        CPU,
        "AutoSGM, ResNet-50, numerator 1 over 0",
        "at most 2.5",
        most(ours("autosgm", "resnet50", "over_ours", "ours, numerator 1"), 2.5),
    ),
    Bar(5, CPU, "AutoSGM, state over what the rule needs", "0 %", paper_state),
    Bar(
        5,
        GPU,
        "AutoSGM, numerator 0, Llama-1B",
        "90 % of the stream",
        least(ours("autosgm", "llama_1b", "stream_share"), 0.9, "{:.0%}"),
    ),
    Bar(
        5,
        GPU,
        "AutoSGM, Llama-1B, against torch AdamW fused",
        "0.95 x",
        faster("llama_1b", "torch AdamW fused", 0.95, "autosgm"),
    ),
    Bar(6, CPU, "loss against torch's over 20 steps", "within 1 % of its range", curves),
    Bar(6, GPU, "loss against torch's over 20 steps", "within 1 % of its range", curves),
    Bar(
        6, GPU, "the bench of `make gpu` over its budget (420 s)", "9 minutes: 1.29", run_time(1.29)
    ),
)

"""What is published is what was measured: summary, bars, figures and guards made from CSV files."""

import csv
import re
import shutil

import pytest
import shim
import torch
from shim.steps import ALL_RULES, check, defaults, vectors

import fused_momentum as fm
from bench import arena, bars, counts, instructions, memory, models, records, summary, train
from bench.cases import CASES, numel
from bench.providers import FOR_LOOP, FUSED, OURS, SGD_HYPER
from bench.records import RESULTS, ROOT, Results, all_results
from bench.timing import CpuClock

CPU = torch.device("cpu")

# --- the published pages ---------------------------------------------------------------------


def test_the_summary_is_made_from_the_committed_results():
    assert summary.SUMMARY.read_text() == summary.page(all_results())


def test_the_readme_is_made_from_the_committed_results():
    text = (ROOT / "README.md").read_text()
    made = summary.readme_block(all_results())
    assert summary.insert(text, made) == text
    assert summary.insert(text, "another table") != text


@pytest.fixture
def copied(tmp_path):
    """The results of one device, in a folder of their own."""
    folder = tmp_path / all_results()[0].folder.name
    shutil.copytree(all_results()[0].folder, folder)
    return folder


def test_another_number_is_another_page(copied):
    before = "\n".join(summary.section(Results(copied)))
    path = copied / "step_sgd.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if row["provider"] == OURS and row["status"] == "ok")
    row["us_p50"] = "123456.0"
    records.write(path, rows, {})
    assert "123,456 µs" in "\n".join(summary.section(Results(copied)))
    assert "123,456 µs" not in before


def test_every_picture_of_the_pages_is_there():
    for page in (summary.SUMMARY, ROOT / "README.md"):
        pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
        assert pictures
        assert not [name for name in pictures if not (page.parent / name).exists()]


def test_figures_are_drawn_from_the_csv_files_alone(copied):
    pytest.importorskip("matplotlib")
    from bench import figures

    for path in copied.glob("*.png"):
        path.unlink()
    drawn = {path.name for path in figures.draw(Results(copied))}
    assert drawn == {path.name for path in (RESULTS / copied.name).glob("*.png")}


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "model name\t: AMD EPYC\ncpu family\t: 23\nmodel\t\t: 49\n",
            "AMD EPYC (family 23, model 49)",
        ),
        ("cpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon 8488C\n", "Xeon 8488C"),
    ],
)
def test_two_processors_have_two_names(cpuinfo, name):
    assert records.processor_name(cpuinfo) == name
    assert records.processor_name("") not in ("", name)


def test_a_hash_of_digits_stays_text(tmp_path):
    records.write(tmp_path / "t.csv", [{"x": 0.123456, "commit": "12345e6789", "cuda": "13.0"}], {})
    (row,) = records.read(tmp_path / "t.csv")
    assert row == {"x": 0.1235, "commit": "12345e6789", "cuda": "13.0"}


# --- bars ------------------------------------------------------------------------------------


class Tables(Results):
    """Results from rows instead of files."""

    def __init__(self, **tables):
        self.tables = tables


def sgd(**more):
    base = {
        "status": "ok",
        "case": "resnet50",
        "dtype": "float32",
        "provider": FUSED,
        "elements": 1,
    }
    return base | more


def sizes(us):
    row = {"status": "ok", "sweep": "one element each", "provider": OURS, "ns_per_unit": 9.0}
    return [row | {"tensors": 100, "us_p50": us}, row | {"tensors": 10, "us_p50": 1.0}]


def losses(gap):
    rows = [{"status": "ok", "model": "m", "optimizer": OURS, "loss": 1.0 + gap}]
    for loss in (1.0, 2.0):
        rows.append({"status": "ok", "model": "m", "optimizer": "torch foreach", "loss": loss})
    return [*rows, {"status": "ok", "model": "m", "optimizer": OURS, "loss": 2.0}]


def per_tensor(own):
    rows = ((OURS, 900 + own), ("a dict and a view", 900))
    return [{"provider": name, "bytes_per_tensor": n} for name, n in rows]


@pytest.mark.parametrize(
    ("measure", "tables", "met"),
    [
        (
            bars.faster("resnet50", FUSED, 1.1),
            lambda x: {"step_sgd": [sgd(over_ours=x)]},
            (1.1, 1.09),
        ),
        (bars.allocations, lambda n: {"step_sgd": [sgd(provider=OURS, allocations=n)]}, (0, 1)),
        (bars.host_line, lambda us: {"size": sizes(us)}, (18.0, 18.1)),  # 15 + 0.03 * 100
        (bars.per_tensor, lambda n: {"per_tensor": per_tensor(n)}, (200, 201)),
        (
            bars.run_time(300 / 240),
            lambda s: {"run": [{"seconds": s / 2, "budget_seconds": 240.0}] * 2},
            (300.0, 301.0),
        ),
        (
            bars.large_share("float32", 0.92),
            lambda x: {"step_sgd": [sgd(provider=OURS, elements=10**8, stream_share=x)]},
            (0.92, 0.91),
        ),
        (
            bars.fastest(("resnet50",)),
            lambda x: {"step_sgd": [sgd(over_ours=2.0, host_over_ours=x)]},
            (1.01, 1.0),
        ),
        (bars.kernels, lambda n: {"step_sgd": [sgd(provider=OURS, kernels=n)]}, (1, 2)),
        (
            bars.floor,
            lambda us: {
                "step_sgd": [
                    sgd(case="1000x1024", provider=OURS, kernel_us=us)
                    | {"bytes_moved": 20_480_000, "stream_gb_per_s": 4096.0}  # 5 us
                ]
            },
            (15.0, 15.1),
        ),
        (bars.curves, lambda gap: {"curves": losses(gap)}, (0.009, 0.011)),
        (
            bars.paper_state,
            lambda n: {
                "memory": [
                    {"status": "ok", "rule": "autosgm", "provider": OURS}
                    | {"state_per_param": n, "state_per_param_on_paper": 8}
                ]
            },
            (8.0, 8.1),
        ),
    ],
)
def test_a_bar_is_met_and_missed_where_it_should_be(measure, tables, met):
    good, bad = met
    assert measure(Tables(**tables(good)))[1] is True
    assert measure(Tables(**tables(bad)))[1] is False
    assert measure(Tables()) is None


def test_rows_that_were_not_measured_meet_no_bar():
    void = sgd(status="void: error 1e-2 above 1e-3", over_ours=99.0)
    assert bars.faster("resnet50", FUSED, 1.1)(Tables(step_sgd=[void])) is None


def test_every_issue_with_bars_has_some():
    assert {bar.issue for bar in bars.BARS} == {2, 3, 4, 5, 6}
    assert {case for case in CASES if any(case in bar.what for bar in bars.BARS)} >= {"300x64"}


# --- what is measured ------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "case"), [(models.resnet, "resnet50"), (models.Gpt, "gpt2_124m")])
def test_models_of_real_size_have_the_parameters_of_their_cases(make, case):
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in make().parameters()]
    assert sorted(shapes) == sorted(CASES[case]())


def test_all_loops_learn_and_ours_walk_the_same_path():
    found = {}
    for name in train.OPTIMIZERS:
        loop = train.Loop(train.SMALL[1], "eager", name, CPU)
        for _ in range(2 * train.BATCHES):
            loop.run(CpuClock())
        found[name] = [float(loss) for loss in loop.losses]
        assert all(min(times) > 0 for times in loop.times)
    ours = found[OURS]
    # The second round of the batches is easier than the first.
    assert sum(ours[train.BATCHES :]) < sum(ours[: train.BATCHES])
    assert found["ours, flat"] == found["ours, flat with grads"] == ours
    # Two runs differ by roundings of fp32 (6e-8 of a loss of 6), which some steps may double.
    assert found[FOR_LOOP] == pytest.approx(ours, rel=1e-5)


def test_memory_held_is_the_memory_on_paper(monkeypatch):
    monkeypatch.setattr(memory, "CASE", "gpt2_124m_small")
    own = [mode for mode in memory.modes(["sgd"], [FUSED]) if mode.provider.name in (OURS, FUSED)]
    assert len(own) == 7
    for mode in own:
        row = memory.mode_row(mode, CPU)
        # Segments of 128 bytes: for 98 tensors at most 98 * 128 bytes, 0.11 a parameter a buffer.
        assert 0 <= row["state_per_param"] - row["state_per_param_on_paper"] < 0.35, (
            mode
        )  # at most three buffers
        assert row["step_extra_bytes"] == 0


# --- instructions ----------------------------------------------------------------------------

DUMP = """# callgrind format
version: 1
creator: callgrind-3.19.0
pid: 28050
cmd:  python t.py
part: 1

desc: I1 cache:
desc: Timerange: Basic block 1302310437 - 1302617011
desc: Trigger: Client Request

positions: line
events: Ir
summary: 1487248

ob=(31) /usr/lib/libc.so.6
fn=(2) malloc
0 3120

totals: 1487248
"""


def test_the_total_of_a_recorded_dump():
    assert instructions.total(DUMP) == 1_487_248
    two = DUMP.replace("events: Ir", "events: Dr Ir").replace("totals: ", "totals: 7 ")
    assert instructions.total(two) == 1_487_248


@pytest.mark.parametrize("text", ["", "events: Ir", DUMP.replace("events: Ir", "events: Dr")])
def test_what_is_no_dump_is_refused(text):
    with pytest.raises(ValueError, match="not a dump of callgrind"):
        instructions.total(text)


@pytest.mark.parametrize(
    ("now", "word"), [(1050, ""), (1051, "TOO MANY"), (951, ""), (949, "--write")]
)
def test_five_percent_more_instructions_pass(now, word):
    (line,) = instructions.compare({"300x64": now}, {"300x64": 1000})
    assert (word in line) if word else not re.search("TOO MANY|--write", line)


def test_a_case_that_is_not_stored_does_not_pass():
    (line,) = instructions.compare({"300x64": 5}, {})
    assert line.startswith("TOO MANY")


def test_without_valgrind_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    monkeypatch.setattr("sys.argv", ["instructions"])
    assert instructions.main() == 2
    assert "valgrind is not installed" in capsys.readouterr().out


def test_every_counted_case_is_stored():
    assert [row["case"] for row in records.read(instructions.FILE)] == list(instructions.COUNTED)


# --- launches and allocations of every model ---------------------------------------------------


def shrunk(name):
    """As many tensors as the model has, of at most 5 in every dimension."""
    return [tuple(min(size, 5) for size in shape) for shape in CASES[name]()]


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_every_model_is_one_launch_and_allocates_nothing(name):
    case = arena.build(shrunk(name), torch.float32, CPU)
    optimizer = fm.FusedSGD(case.params, **SGD_HYPER)
    optimizer.step()
    assert counts.allocations(optimizer.step, CPU).count == 0
    assert counts.launches(optimizer) == 1


def test_other_dtypes_are_other_launches():
    two = [arena.build([(5,)] * 3, dtype, CPU) for dtype in (torch.float32, torch.bfloat16)]
    optimizer = fm.FusedSGD([p for case in two for p in case.params], **SGD_HYPER)
    optimizer.step()
    assert counts.launches(optimizer) == 2


@pytest.fixture(scope="module")
def kernels(request):
    if not shim.has_compiler():
        pytest.skip(f"no C++ compiler {shim.CXX[0]}")
    return shim.Shim(request.config.cache.mkdir("shim"))


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_every_model_is_one_launch_of_the_cuda_kernels(kernels, name):
    rule = ALL_RULES["sgd"]
    sizes = [numel([shape]) for shape in shrunk(name)]
    check(kernels, rule, vectors(rule, sizes), defaults(rule), launches=1)

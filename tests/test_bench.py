"""The bench counts bytes and parameters right, and its gate refuses a wrong optimizer."""

from itertools import groupby

import pytest
import torch

from bench import cases, gate, memory, providers, readme
from bench.budget import Budget
from bench.host import fit
from bench.providers import BASELINES, FOR_LOOP, FUSED, OURS
from bench.step import enter
from bench.timing import MIN_ROUNDS, Contestant, CpuClock, interleave, ratio

# Tensors and parameters as published, or counted in the reference implementations.
KNOWN = {
    "300x64": (300, 19_200),
    "10000x64": (10_000, 640_000),
    "1000x1024": (1000, 1_024_000),
    "3000x1024": (3000, 3_072_000),
    "3000x3500": (3000, 10_500_000),
    "1x64M": (1, 67_108_864),
    "10x16M": (10, 167_772_160),
    "200x1M": (200, 209_715_200),
    "500_mixed": (500, 27_960_000),
    "resnet50": (161, 25_557_032),
    "vit_b16": (152, 86_567_656),
    "vit_l16": (296, 304_326_632),
    "gpt2_124m": (148, 124_439_808),
    "gpt2_xl": (580, 1_557_611_200),
    "llama_1b": (146, 1_235_814_400),
    "llama_7b": (291, 6_738_415_616),
    "lora_7b": (256, 16_777_216),
    "1x2G": (1, 2_147_483_656),
}


@pytest.mark.parametrize("name", cases.CASES)
def test_case_has_the_known_number_of_tensors_and_parameters(name):
    shapes = cases.CASES[name]()
    assert (len(shapes), cases.numel(shapes)) == KNOWN[name]


@pytest.mark.parametrize(
    ("param", "state", "an_element"),
    [
        (torch.float32, None, 12),
        (torch.float32, torch.float32, 20),
        (torch.bfloat16, torch.float32, 14),
        (torch.bfloat16, torch.bfloat16, 10),
        (torch.float64, torch.float64, 40),
    ],
)
def test_bytes_moved(param, state, an_element):
    assert providers.bytes_moved(1000, param, state) == 1000 * an_element


def test_bytes_needed_counts_parameters_gradients_states_and_one_temporary():
    # fp32: p, g, four momentum buffers and foreach's temporary, 4 bytes each.
    assert providers.bytes_needed(10, [torch.float32], (OURS, *BASELINES)) == 10 * 7 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_passes_ours_and_the_for_loop(dtype):
    arena = providers.build([(70_001,), (3, 5), (1,)], dtype, torch.device("cpu"))
    for provider in (OURS, FOR_LOOP):
        assert enter(provider, arena).verdict.problem == ""


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"lr": 0.1001}, {"weight_decay": 0.0}], ids=str)
def test_gate_refuses_another_update(change):
    arena = providers.build([(1000,), (7,)], torch.float32, torch.device("cpu"))
    wrong = torch.optim.SGD(arena.params, **providers.HYPER | change)
    assert gate.judge(FOR_LOOP, arena, wrong).problem


def test_budget_predicts_from_the_cases_that_ran():
    budget = Budget(seconds=100.0, cases=2)
    budget.learn(elements=10**8, tensors=10, seconds=10.0)
    budget.learn(elements=10**4, tensors=1000, seconds=1.0)
    assert budget.too_long(elements=5 * 10**8, tensors=100) == ""  # 50.1 s
    assert "needs about 110 s" in budget.too_long(elements=10**9, tensors=10_000)


def test_gate_refuses_changed_gradients():
    arena = providers.build([(1000,)], torch.float32, torch.device("cpu"))
    optimizer = providers.make(FOR_LOOP, arena.params)
    optimizer.register_step_post_hook(lambda *_: arena.grads[0].mul_(0.999))
    assert gate.judge(FOR_LOOP, arena, optimizer).problem == "gradients changed"


def test_sample_holds_the_last_element():
    tensor = torch.arange(10 * gate.LIMIT + 5.0)
    (sample,) = gate.sample([tensor])
    assert sample[-1] == tensor[-1]
    assert gate.LIMIT // 2 < sample.numel() < 2 * gate.LIMIT


def test_step_memory_counts_allocations_and_their_peak():
    def step():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        return torch.empty(300, dtype=torch.uint8), torch.empty(400, dtype=torch.uint8)

    assert memory.step_memory(step, torch.device("cpu")) == (3, 1000)


def test_torch_fused_allocates_nothing_and_foreach_does():
    arena = providers.build([(1000,)], torch.float32, torch.device("cpu"))
    allocations = {}
    for provider in BASELINES:
        optimizer = providers.make(provider, arena.params)
        optimizer.step()
        allocations[provider], _ = memory.step_memory(optimizer.step, torch.device("cpu"))
    assert allocations.pop(FUSED) == 0
    assert all(allocations.values())


def test_interleave_gives_every_contestant_a_turn_in_every_round():
    order = []
    contestants = [Contestant((name,), lambda name=name: order.append(name)) for name in "ab"]
    rounds = interleave(contestants, CpuClock(), deadline=0.0)
    assert rounds == MIN_ROUNDS
    assert [len(contestant.total) for contestant in contestants] == [rounds, rounds]
    turns = [name for name, _ in groupby(order[2:])]  # after the warm-up
    assert turns == list("ababab")  # ab ba ab ba ab: the order turns round by round


def test_ratio_is_the_median_over_rounds():
    slow = Contestant(("slow",), None, total=[[4.0, 4.0], [60.0], [8.0]])
    fast = Contestant(("fast",), None, total=[[2.0], [20.0, 20.0], [2.0]])
    assert ratio(slow, fast)[1] == 3.0


def test_fit_recovers_a_line():
    counts = [10, 100, 1000]
    assert fit(counts, [7 + 0.03 * n for n in counts]) == pytest.approx((0.03, 7.0))


def test_the_readme_table_is_made_from_the_committed_results():
    text = (readme.ROOT / "README.md").read_text()
    (folder,) = {path.parent for path in readme.RESULTS.glob("amd-epyc/step.csv")}
    assert readme.insert(text, readme.table(folder)) == text
    assert readme.insert(text, "another table") != text

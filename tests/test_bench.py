"""The bench counts bytes and parameters right, and its gate refuses a wrong optimizer."""

from itertools import groupby

import pytest
import torch

from bench import arena, cases, counts, formulas, gate, providers, run, step
from bench.budget import Budget
from bench.formulas import Plain
from bench.providers import COMPILED, FOR_LOOP, FOREACH, FUSED, OURS, RULES, SGD_HYPER
from bench.size import fit
from bench.step import enter
from bench.timing import (
    MIN_ROUNDS,
    SLOW_ROUNDS,
    TURN_US,
    WARM_UPS,
    Contestant,
    interleave,
    ratio,
)

CPU = torch.device("cpu")
SGD_PEERS = {p.name: p for p in RULES["sgd"].providers}

# --- cases -----------------------------------------------------------------------------------

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
    "vit_s16": (152, 22_050_664),
    "vit_b16": (152, 86_567_656),
    "vit_l16": (296, 304_326_632),
    "vit_h14": (392, 632_045_800),
    "gpt2_124m": (148, 124_439_808),
    "gpt2_124m_small": (98, 121_344),
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


def test_rules_name_cases_that_exist_and_share_the_time():
    assert {case for rule in RULES.values() for case in rule.cases} <= set(cases.CASES)
    assert sum(rule.share for rule in RULES.values()) > 0


# --- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("param", "states", "second_pass", "an_element"),
    [
        (torch.float32, [], 0, 12),
        (torch.float32, [torch.float32], 0, 20),
        (torch.float32, [torch.float32] * 2, 0, 28),
        (torch.float32, [torch.float32] * 4, 12, 56),  # AutoSGM's numerator 1, in two passes
        (torch.bfloat16, [torch.float32], 0, 14),
        (torch.bfloat16, [torch.bfloat16], 0, 10),
        (torch.float64, [torch.float64], 0, 40),
    ],
)
def test_bytes_moved(param, states, second_pass, an_element):
    assert providers.bytes_moved(1000, param, states, second_pass) == 1000 * an_element


def test_bytes_needed_counts_parameters_gradients_states_and_one_temporary():
    four = [SGD_PEERS[name] for name in (OURS, FOR_LOOP, FOREACH, FUSED)]
    # fp32: p, g, four momentum buffers and foreach's temporary, 4 bytes each.
    assert providers.bytes_needed(10, [torch.float32], four) == 10 * 7 * 4
    # bf16 beside it: p, g, three buffers of 2 bytes and ours of 4; one temporary for both.
    dtypes = [torch.float32, torch.bfloat16]
    assert providers.bytes_needed(10, dtypes, four) == 10 * (7 * 4 + 5 * 2 + 4)


def test_state_bytes_counts_a_shared_buffer_once():
    case = arena.build([(100,), (28,)], torch.float32, CPU)
    optimizer = SGD_PEERS[OURS].make(case.params)
    optimizer.step()
    assert providers.state_bytes(optimizer) == 512  # 128 elements, all views of one buffer
    assert providers.state_dtypes(optimizer, case.params[0]) == [torch.float32]


# --- the gate --------------------------------------------------------------------------------

SHAPES = [(70_001,), (3, 5), (64, 33), (7,)]
TRIED = [(rule, p) for rule, row in RULES.items() for p in row.providers if not p.compiles]


@pytest.mark.parametrize(("rule", "provider"), TRIED, ids=[f"{r}-{p.name}" for r, p in TRIED])
def test_every_provider_of_fp32_passes_the_gate(rule, provider):
    if reason := provider.absent(CPU):
        pytest.skip(reason)
    entry = enter(provider, [arena.build(SHAPES, torch.float32, CPU)])
    assert entry.status.startswith("ok")


@pytest.mark.parametrize("name", [OURS, FOR_LOOP])
def test_gate_passes_ours_and_the_for_loop_in_bf16(name):
    entry = enter(SGD_PEERS[name], [arena.build(SHAPES, torch.bfloat16, CPU)])
    assert entry.status == "ok"


def judged(change, truth=providers.torch_sgd, whole=False):
    """The gate's word on torch's for-loop with other hyper-parameters."""
    case = arena.build([(1000,), (7,)], torch.float32, CPU)
    provider = providers.Provider("changed", providers.torch_sgd, truth, whole=whole)
    return gate.judge(provider, case, providers.torch_sgd(case.params, **change)).problem


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"lr": 0.1001}, {"weight_decay": 0.0}], ids=str)
@pytest.mark.parametrize("whole", [False, True])
def test_gate_refuses_another_update(change, whole):
    assert judged({}, whole=whole) == ""
    assert judged(change, whole=whole)


def test_gate_lets_another_rule_pass_if_it_moves_and_stays_finite():
    assert judged({"lr": 0.5}, truth=None) == ""
    assert judged({"lr": 0.0}, truth=None) == "parameters not updated"
    assert judged({"lr": float("inf")}, truth=None) == "parameters not updated"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("whole", [False, True])
def test_gate_refuses_one_tensor_left_as_it_was(dtype, whole):
    case = arena.build([(1000,), (7,), (300,)], dtype, CPU)
    provider = providers.Provider("lazy", providers.torch_sgd, providers.torch_sgd, whole=whole)
    lazy = providers.torch_sgd([case.params[0], case.params[2]])
    assert "above" in gate.judge(provider, case, lazy).problem


@pytest.mark.parametrize("taken", [False, True])
def test_gate_refuses_changed_gradients_and_missing_ones(taken):
    case = arena.build([(1000,)], torch.float32, CPU)
    provider = SGD_PEERS[FOR_LOOP]
    optimizer = provider.make(case.params)

    def spoil(*_):
        if taken:
            case.params[0].grad = None
        else:
            case.grads[0].mul_(0.999)

    optimizer.register_step_post_hook(spoil)
    assert gate.judge(provider, case, optimizer).problem == "gradients changed"


def test_gate_sees_nan():
    assert (
        not gate.largest_error([torch.ones(3), torch.tensor([torch.nan])], [torch.ones(3)] * 2) <= 1
    )


def test_sample_holds_the_last_element():
    tensor = torch.arange(10 * arena.SAMPLED + 5.0)
    (sample,) = arena.compared([tensor], whole=False)
    assert sample[-1] == tensor[-1]
    assert arena.SAMPLED // 2 < sample.numel() < 2 * arena.SAMPLED


def test_whole_tensors_are_compared_where_an_element_depends_on_all():
    small, large = torch.ones(5), torch.ones(arena.WHOLE + 1)
    assert [t.numel() for t in arena.compared([small, large], whole=True)] == [5]
    assert [t.numel() for t in arena.compared([large], whole=True)] == [arena.WHOLE + 1]


# --- formulas --------------------------------------------------------------------------------


SMALL = [(50,), (4, 6)]


def stepped(make):
    case = arena.build(SMALL, torch.float64, CPU)
    return gate.stepped(make, case.params, case.grads)


def test_decoupled_decay_of_zero_is_heavy_ball():
    hyper = SGD_HYPER | {"weight_decay": 0.0}
    got = stepped(lambda params: Plain(params, formulas.decoupled_sgd, **hyper))
    want = stepped(lambda params: providers.torch_sgd(params, **hyper))
    assert gate.largest_error(got, want) < 1e-16  # parameters of 0.1, a rounding of float64


def test_autosgm_with_a_constant_numerator_is_adam():
    got = stepped(lambda params: Plain(params, formulas.autosgm, lr=0.01, numerator=0))
    want = stepped(lambda params: torch.optim.Adam(params, lr=0.01, eps=1e-10))
    # (g + eps)^2 instead of g^2 changes g, and so a step of at most 0.01, by eps / |g| twice over.
    smallest = min(grad.abs().min() for grad in arena.build(SMALL, torch.float64, CPU).grads)
    assert gate.largest_error(got, want) < 3 * 0.01 * 2 * 1e-10 / (smallest / 2)
    for betas in ((0.9, 0.99), (0.8, 0.999)):
        other = stepped(lambda params, b=betas: torch.optim.Adam(params, lr=0.01, betas=b))
        assert gate.largest_error(got, other) > 1e-5


@pytest.mark.parametrize("numerator", [None, 0, 1, 2, 3])
def test_numerators_differ(numerator):
    first, other = (
        stepped(lambda params, n=n: Plain(params, formulas.autosgm, lr=0.01, numerator=n))
        for n in (numerator, 0 if numerator else 3)
    )
    assert gate.largest_error(first, other) > 1e-5


def sum_of_grads(grad):
    """What the gate's steps see of a gradient together."""
    factors = torch.tensor(gate.FACTORS).cumprod(0)
    return grad * factors.sum().item()


def test_sgd_sai_scales_by_the_root_of_the_number_of_elements():
    (p, _), (q, _) = (
        stepped(lambda params, f=f: Plain(params, f, lr=0.01, momentum=0.0, weight_decay=0.0))
        for f in (formulas.sgd_sai, formulas.sgd_sai_matrices)
    )
    start = arena.build(SMALL, torch.float64, CPU)
    moved = (start.params[0] - p) / (0.01 * sum_of_grads(start.grads[0]))
    assert moved.std() < 1e-9 * moved.mean()
    assert moved.mean() == pytest.approx(50**0.5, rel=0.1)  # a mean near 0: see c in the facts
    assert not torch.allclose(p, q)  # for vectors pytorch_optimizer has another scale


# --- counts ----------------------------------------------------------------------------------


def test_allocations_are_counted_with_their_peak_and_what_is_left():
    def work():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        return torch.empty(300, dtype=torch.uint8), torch.empty(400, dtype=torch.uint8)

    assert counts.allocations(work, CPU) == (3, 1000, 700)


def test_torch_fused_allocates_nothing_and_foreach_does():
    case = arena.build([(1000,)], torch.float32, CPU)
    found = {}
    for name in (FUSED, FOREACH, FOR_LOOP):
        optimizer = SGD_PEERS[name].make(case.params)
        optimizer.step()
        found[name] = counts.allocations(optimizer.step, CPU).count
    assert found.pop(FUSED) == 0
    assert all(found.values())


# --- time ------------------------------------------------------------------------------------


def test_budget_predicts_from_the_cases_that_ran():
    budget, fused = Budget(seconds=100.0, cases=2), SGD_PEERS[FUSED]
    budget.learn(fused, [(10**7,)] * 10, seconds=0.05)
    budget.learn(fused, [(10,)] * 1000, seconds=0.001)
    assert budget.step(fused, [(10**7,)] * 200) == pytest.approx(1.0002)
    # Ten steps in each of two dtypes, and a peer gets 10 of 100 s.
    assert budget.refuse(fused, [(10**7,)] * 95, 2) == ""
    assert "needs about 10.5 s, of 10 s" in budget.refuse(fused, [(10**7,)] * 105, 2)


def test_budget_leaves_out_the_slowest_peers_and_a_case_that_is_too_long_for_ours(monkeypatch):
    clock = iter([0.0] + [95.0] * 50)
    monkeypatch.setattr("bench.budget.time.monotonic", lambda: next(clock))
    budget = Budget(seconds=100.0, cases=2)
    three = [SGD_PEERS[name] for name in (OURS, FUSED, FOR_LOOP)]
    shapes = [(10**7,)] * 10
    for provider, seconds in zip(three, (0.03, 0.06, 0.1), strict=True):
        budget.learn(provider, shapes, seconds)
    # Ten steps of each in 5 s, and twice that besides.
    assert budget.fitting(three, shapes, 1) == (three[:2], "skipped: needs about 5.71 s, of 5 s")
    assert budget.fitting(three, shapes[:1], 1) == (three, "")
    budget.learn(three[0], shapes, seconds=0.2)
    assert budget.fitting(three, shapes, 1) == ([], "skipped: needs about 6 s, of 5 s")


def test_budget_refuses_only_the_peer_that_takes_more_than_its_share():
    budget, both = Budget(seconds=100.0, cases=2), [SGD_PEERS[OURS], SGD_PEERS[FUSED]]
    shapes = [(10**7,)] * 10
    budget.learn(both[1], shapes, seconds=50.0)
    assert budget.fitting(both, shapes, 1) == (both, "")
    assert budget.refuse(both[1], shapes, 1) != ""
    assert budget.refuse(both[0], shapes, 1) == ""


def test_budget_refuses_to_compile_for_long_and_learns_how_long_that_is(monkeypatch):
    budget, compiled = Budget(seconds=100.0, cases=2), SGD_PEERS[COMPILED]
    shapes = [(10,)] * 300
    assert "needs about 30 s for compiling, of 25 s" in budget.refuse(compiled, shapes, 1)
    assert budget.refuse(compiled, shapes[:200], 1) == ""
    with budget.compiling(compiled, shapes[:1]):  # from a cache
        pass
    assert budget.refuse(compiled, shapes, 1) != ""
    clock = iter([0.0, 20.0])
    monkeypatch.setattr("bench.budget.time.monotonic", lambda: next(clock))
    with budget.compiling(compiled, shapes[:100]):
        pass
    assert "needs about 20 s for compiling, of 5 s" in budget.refuse(compiled, shapes[:100], 1)


@pytest.mark.parametrize(
    ("gib", "dtypes", "peers"),
    [
        (40.0, [torch.float32, torch.bfloat16], [FUSED, FOR_LOOP]),  # 1.04 * 36 + 1
        (38.0, [torch.float32], [FUSED, FOR_LOOP]),
        (25.0, [torch.float32], [FUSED]),  # 1.04 * 24 + 1 would be 26
        (20.0, [torch.float32], []),
        (15.0, [], []),
    ],
)
def test_what_does_not_fit_in_memory_is_left_out(monkeypatch, gib, dtypes, peers):
    monkeypatch.setattr(run.memory, "available", lambda device: gib * 2**30)
    three = [SGD_PEERS[name] for name in (OURS, FUSED, FOR_LOOP)]
    race = step.Race(RULES["sgd"], three, CPU, None)
    asked = [torch.float32, torch.bfloat16]
    fit, running, reason = run.choose([(2**30,)], asked, race, Budget(1e6, cases=1))
    assert fit == dtypes
    assert [provider.name for provider in running] == [OURS, *peers]
    assert bool(reason) == (gib < 40)


def test_a_step_goes_round_the_copies():
    copies = [arena.build([(9,)], torch.float32, CPU) for _ in range(3)]
    entry = enter(SGD_PEERS[OURS], copies)
    before = [case.params[0].clone() for case in copies]
    for turn in range(1, 5):
        entry.contestant.step()
        now = [case.params[0] for case in copies]
        moved = [not torch.equal(p, q) for p, q in zip(now, before, strict=True)]
        assert moved == [turn > 0, turn > 1, turn > 2]


class Gpu:
    """Says of a GPU what `copies` asks."""

    type = "cuda"
    L2_cache_size = 50 * 2**20


@pytest.mark.parametrize(
    ("numel", "free", "expected"), [(2**18, 99.9, 50), (2**18, 7.5, 7), (9, 99, 64)]
)
def test_copies_exceed_the_cache_four_times_where_memory_allows(monkeypatch, numel, free, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: device)
    case = arena.build([(numel // 2,)] * 4, torch.float32, CPU)  # p and g: 16 bytes a numel
    assert step.copies(Gpu(), case, free) == expected
    assert step.copies(CPU, case, free) == 1


class StoppedClock:
    """Says that a step takes as long as it returns, whatever else the machine does."""

    def time(self, step, prepare):
        prepare()
        return (step(),) * 2


def test_interleave_gives_every_contestant_a_turn_in_every_round():
    order = []
    contestants = [Contestant((key,), lambda key=key: order.append(key) or 1.0) for key in "ab"]
    rounds = interleave(contestants, StoppedClock(), deadline=0.0)
    assert rounds == MIN_ROUNDS
    assert [len(contestant.total) for contestant in contestants] == [rounds, rounds]
    turns = [name for name, _ in groupby(order[2 * WARM_UPS :])]
    assert turns == list("ababab")  # ab ba ab ba ab: the order turns round by round


def test_a_turn_is_as_long_as_steps_are_when_warm():
    times = iter([1000.0, 200.0, 100.0])
    contestant = Contestant((0,), lambda: next(times, 100.0))
    interleave([contestant], StoppedClock(), deadline=0.0)
    assert {len(turn) for turn in contestant.total} == {TURN_US // 100}


def test_one_that_is_far_too_slow_drops_out():
    contestants = [Contestant((us,), lambda us=us: us) for us in (1.0, 2.0, 1e9)]
    rounds = interleave(contestants, StoppedClock(), deadline=0.0)
    assert [len(contestant.total) for contestant in contestants] == [rounds, rounds, SLOW_ROUNDS]
    assert ratio(contestants[2], contestants[0])[1] == 1e9


def test_ratio_is_the_median_over_rounds():
    slow = Contestant(("slow",), None, total=[[4.0, 4.0], [60.0], [8.0]])
    fast = Contestant(("fast",), None, total=[[2.0], [20.0, 20.0], [2.0]])
    assert ratio(slow, fast)[1] == 3.0


def test_fit_recovers_a_line():
    sizes = [10, 100, 1000]
    assert fit(sizes, [7 + 0.03 * n for n in sizes]) == pytest.approx((0.03, 7.0))

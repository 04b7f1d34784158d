"""What the CUDA launcher keeps from step to step, run on the CPU (tests/shim)."""

import pytest
import shim
import torch
from cases import TILE
from shim.steps import ALL_RULES, Step, capacity, copies, defaults, fresh_kept, vectors

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason=f"no C++ compiler {shim.CXX[0]}")
SGD = ALL_RULES["sgd"]
ROWS = 3
# Where tables are: in small or in large arguments of the kernel, or in device memory.
places = pytest.mark.parametrize("place", ["small", "large", "memory"])


@pytest.fixture(scope="session")
def kernels(request):
    return shim.Shim(request.config.cache.mkdir("shim"))


class Training:
    """The same tensors, by the kernels and by the reference, from step to step."""

    generation = 0  # of all: a plan's are its own, but the shim has one machine for all of them

    def __init__(self, kernels, rule, place):
        self.kernels, self.rule, self.place = kernels, rule, place
        smaller = {"large": 0, "memory": 1}
        # Some more than fit into the smaller ones: a change may take one away.
        count = 5 + (capacity(kernels, rule, smaller[place], ROWS) if place in smaller else 0)
        tensors = vectors(rule, [TILE + 3, *(1 + i % 5 for i in range(count - 1))])
        self.ours, self.truth = copies(tensors), copies(tensors)
        self.kept = fresh_kept(rule, count), fresh_kept(rule, count)
        self.rows = [i % ROWS for i in range(count)]
        self.first = [0.0] * count
        self.hyper = [defaults(rule) | {"lr": lr} for lr in (0.1, 0.2, 0.3)]
        self.options = {}

    def renew(self):
        """What the plan does when it has noticed a change."""
        Training.generation += 1

    def step(self):
        """A step with the bits of the reference; whether tables were kept for it."""
        common = {"rows": self.rows, "first": self.first, "kept": self.kept}
        step = Step(
            self.kernels, self.rule, self.ours, self.truth, self.hyper,
            generation=Training.generation, **common, **self.options,
        )  # fmt: skip
        passes = [] if self.rule.measure is None else [step.measure]
        results = [run() for run in [*passes, step.update]]
        for result in results:
            assert result.large == (self.place == "large")
            assert result.uploads == (self.place == "memory")
        return [result.kept for result in results]


EVENTS = {}


def event(function):
    EVENTS[function.__name__] = function
    return function


@event
def address_of_a_parameter(training):
    for tensors in (training.ours, training.truth):
        tensors[2][0] = tensors[2][0].clone()


@event
def address_of_a_gradient(training):
    for tensors in (training.ours, training.truth):
        tensors[1][1] = tensors[1][1] * 2


@event
def address_of_a_state(training):
    for tensors in (training.ours, training.truth):
        tensors[3][2] = tensors[3][2] * 2


@event
def length(training):
    for tensors in (training.ours, training.truth):
        tensors[0] = [t[: TILE - 7] for t in tensors[0]]


@event
def frozen(training):
    training.held = [(tensors, tensors[4]) for tensors in (training.ours, training.truth)]
    for tensors in (training.ours, training.truth):
        tensors[4] = [t[:0] for t in tensors[4]]


@event
def row(training):
    training.rows[1] = 2


@event
def first_step(training):
    training.first[4] = 1.0


@places
@pytest.mark.parametrize("change", EVENTS.values(), ids=EVENTS)
def test_what_has_changed_is_packed_anew(kernels, change, place):
    training = Training(kernels, SGD, place)
    training.renew()
    assert training.step() == [0]
    assert training.step() == [1]
    change(training)
    training.renew()
    assert training.step() == [0]
    assert training.step() == [1]
    for tensors, streams in getattr(training, "held", ()):  # and thawed
        tensors[4] = streams
    training.renew()
    assert training.step() == [0]


@places
@pytest.mark.parametrize("name", ["sgd", "sgd_sai", "toy"])
def test_numbers_are_those_of_the_step(kernels, name, place):
    """Hyper-parameters, signs, scales and their addresses, with tables that are kept."""
    training = Training(kernels, ALL_RULES[name], place)
    passes = 1 + (training.rule.measure is not None)
    training.renew()
    assert training.step() == [0, 1][:passes]
    for tensors in (training.ours, training.truth):
        for streams in tensors:
            streams[1].mul_(0.5)
    training.hyper[1]["lr"] = 0.05
    training.hyper[2]["momentum"] = 0.3
    assert training.step() == [1] * passes
    training.options = {"multipliers": [1.0, -2.0, 3.0]}
    assert training.step() == [1] * passes
    scale = torch.tensor(3.0)
    unscale = scale.double().reciprocal().float().item()
    training.options = {"grad_scale": scale, "true_multipliers": [unscale] * 3}
    assert training.step() == [1] * passes
    true = [row | {"lr": lr} for row, lr in zip(training.hyper, (0.75, 0.05, 0.25), strict=True)]
    training.options = {"lr": [torch.tensor(0.75), None, torch.tensor(0.25)], "true_hyper": true}
    assert training.step() == [1] * passes
    training.options = {}
    assert training.step() == [1] * passes


@places
def test_a_graph_is_captured_with_tables_of_its_own(kernels, place):
    """What fits into arguments is kept; what does not is split for the graph, and not after it."""
    training = Training(kernels, SGD, place)
    training.renew()
    fits = place != "memory"
    for capturing, kept in ((0, 0), (1, fits), (1, 1), (0, fits), (0, 1)):
        training.options = {"capturing": capturing}
        step = Step(
            kernels, SGD, training.ours, training.truth, training.hyper, rows=training.rows,
            generation=Training.generation, **training.options,
        )  # fmt: skip
        result = step.update()
        assert result.kept == kept
        assert result.launches == (2 if capturing and not fits else 1)
        assert result.uploads == (not capturing and not fits)


def test_blocks_of_another_size_are_counted_anew(kernels):
    training = Training(kernels, SGD, "small")
    training.renew()
    for per_block in (1, 3):
        training.options = {"tiles_per_block": per_block}
        assert training.step() + training.step() == [0, 1]


def test_other_launches_come_between(kernels):
    """One without a number keeps nothing; another plan's number is another."""
    training = Training(kernels, SGD, "small")
    training.renew()
    assert training.step() + training.step() == [0, 1]
    other = vectors(SGD, [9, 9])
    for generation in (0, 0):
        step = Step(kernels, SGD, copies(other), copies(other), defaults(SGD))
        step.options["generation"] = generation
        assert step.update().kept == 0
    assert training.step() == [0]


def test_a_change_that_went_unnoticed_would_be_seen(kernels):
    """Negative control: the same number for other tensors is what these tests are about."""
    training = Training(kernels, SGD, "small")
    training.renew()
    training.step()
    address_of_a_parameter(training)
    with pytest.raises(AssertionError):
        training.step()

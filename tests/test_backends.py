"""Which back-end is chosen, that it is the one that runs, and what is said where there is none."""

import importlib
import re
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from cases import (
    CLASSES,
    EXTENSION,
    TYPES,
    VARIANTS,
    Form,
    Run,
    accepted,
    differing,
    op_variants,
)
from torch.nn import Parameter

import fused_momentum
from fused_momentum import graphs, native, reference, watch
from fused_momentum.backends import PREFERENCE, backends, check_request, choose
from fused_momentum.plan import _device_types
from fused_momentum.rules import RULES
from fused_momentum.watch import Question, Watch

OURS = pytest.mark.parametrize("cls", CLASSES.values(), ids=lambda cls: cls.__name__)
REASON = "no compiled code today"


@pytest.fixture
def without_extension(monkeypatch):
    """The package as it is installed where nothing could be compiled."""

    def fail(name, *more):
        if name == "fused_momentum._C":
            raise ImportError(REASON)
        return real(name, *more)

    real = importlib.import_module
    monkeypatch.setattr(native.importlib, "import_module", fail)
    native.load.cache_clear()
    native.rule_number.cache_clear()
    yield
    native.load.cache_clear()
    native.rule_number.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """Counts the updates that the reference makes."""
    made = []
    update = reference.Update.update
    monkeypatch.setattr(reference.Update, "update", lambda u: made.append(u) or update(u))
    return made


# --- the table -------------------------------------------------------------------------------


def test_every_row_has_a_name_and_a_reason():
    rows = {row.name: row for row in backends()}
    assert list(rows)[:2] == ["reference", "cpu"]
    assert rows["reference"].available
    assert rows["cpu"].available, "the tests are run with the extension"
    assert EXTENSION.cpu_level() in rows["cpu"].reason
    assert all(row.reason for row in rows.values())
    assert {name for names in PREFERENCE.values() for name in names} <= set(rows)
    assert fused_momentum.backends() == backends()


def test_auto_takes_the_fastest_and_explicit_requests_are_kept():
    assert choose("auto", "cpu").name == "cpu"
    for name in ("cpu", "reference"):
        assert choose(name, "cpu") == (name, "requested")
    assert choose("auto", "xpu").name == "reference"
    assert choose("reference", "xpu").name == "reference"


ERRORS = {
    "unknown": (lambda: check_request("gpu"), ValueError, r"backend='gpu' is not one of \['auto'"),
    "none": (lambda: check_request(None), ValueError, "backend=None is not one of"),
    "device": (
        lambda: choose("cpu", "xpu"),
        RuntimeError,
        "'cpu' cannot update xpu .* works on cpu",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_a_request_that_cannot_be_met_raises(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# --- what runs is what is said ---------------------------------------------------------------


@OURS
@pytest.mark.parametrize("request_", ["auto", "cpu", "reference"])
def test_what_runs_is_what_repr_says(cls, request_, calls):
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = cls([p], lr=0.1, backend=request_)
    said = re.search(r"^backend: (\w+) for cpu \((.+)\)$", repr(optimizer), re.MULTILINE)
    assert said, repr(optimizer)
    assert said[1] == ("cpu" if request_ == "auto" else request_)
    assert said[0].endswith(optimizer.backend)
    optimizer.step()
    assert len(calls) == (said[1] == "reference")


@OURS
def test_repr_works_before_the_parameters_have_memory(cls):
    optimizer = cls([Parameter(torch.ones(3, device="meta"))], lr=0.1)
    assert "lr: 0.1" in repr(optimizer)


# --- without the extension -------------------------------------------------------------------

FORMS = (Form((7,)), Form((1030,)), Form((5, 6, 7, 3), "channels_last"))


@pytest.mark.usefixtures("without_extension")
@OURS
def test_pure_python_works_and_says_why(cls, calls):
    assert native.load()[0] is None
    rows = {row.name: row for row in fused_momentum.backends()}
    assert not rows["cpu"].available
    assert REASON in rows["cpu"].reason
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = cls([p], lr=0.5, **accepted(cls, momentum=0))
    assert optimizer.backend.startswith("reference for cpu (cpu: ")
    assert REASON in repr(optimizer)
    warns = pytest.warns(RuntimeWarning, match=REASON)
    steps = ((optimizer.step, warns), (lambda: optimizer.step_params([p]), nullcontext()))
    for step, once in steps:
        before = p.detach().clone()
        with once:
            step()
        assert calls.pop()
        assert (p < before).all()


@pytest.mark.usefixtures("without_extension")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_pure_python_gives_the_same_bits(variant):
    auto, truth = (Run(variant, FORMS, TYPES["f32"], name) for name in ("auto", "reference"))
    with pytest.warns(RuntimeWarning, match="plain torch, slower than by torch.optim.SGD"):
        auto.train()
    assert not differing(auto, truth.train())


@pytest.mark.usefixtures("without_extension")
@op_variants
def test_pure_python_ops(variant):
    lists = [[torch.ones(3)] for _ in range(2 + len(variant.rule.states))]
    getattr(fused_momentum.ops, f"{variant.name}_")(*lists, **variant.hyper)
    assert not torch.equal(lists[0][0], torch.ones(3))


@pytest.mark.usefixtures("without_extension")
@OURS
def test_an_explicit_request_without_the_extension_raises_with_the_reason(cls):
    with pytest.raises(RuntimeError, match=f"backend='cpu' cannot be used: .*{REASON}"):
        cls([Parameter(torch.ones(3))], lr=0.1, backend="cpu")


def test_an_extension_of_another_torch_is_not_used(monkeypatch):
    """It looks into torch's tensors where this release has them."""
    monkeypatch.setattr(native.load()[0], "TORCH_VERSION", "1.2.3")
    native.load.cache_clear()
    try:
        extension, reason = native.load()
        assert extension is None
        assert "was built for torch 1.2.3, and this is torch 2." in reason
    finally:
        native.load.cache_clear()


@pytest.mark.usefixtures("without_extension")
def test_the_reason_is_remembered_and_says_what_to_do():
    reason = native.load()[1]
    assert "pip install" in reason
    assert native.load()[1] is reason, "the load is tried only once"
    with pytest.raises(RuntimeError, match=REASON):
        native.rule_number("sgd")


# --- without a gradient, and in a capture ----------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "expected"),
    [(["cuda"], ["cuda"]), (["cuda", "cpu"], ["cpu", "cuda"]), (["meta"], ["cpu"]), ([], ["cpu"])],
)
def test_parameters_without_gradients_keep_to_their_devices(devices, expected):
    """A step before the first gradient asks no back-end for tensors that are elsewhere."""
    params = [SimpleNamespace(grad=None, device=torch.device(device)) for device in devices]
    assert _device_types([{"params": params}]) == expected


def test_no_event_is_asked_while_a_graph_is_captured(monkeypatch):
    """It would end the capture; whether there is something to measure is then unknown: yes."""
    settled, asked = [], []
    walk = SimpleNamespace(measures=lambda: True, settle=lambda *found: settled.append(found))
    watching = Watch(RULES["sgd_sai"], walk)
    event = SimpleNamespace(query=lambda: asked.append(1) or True)
    kept, hyper, device = [None] * 3, [0.0] * 6, torch.device("cuda", 1)
    good, waiting = [2.0, 3.0, 1.0], [0.0, 0.0, 1.0]
    numbers = torch.tensor([good, waiting])
    watching._questions = [Question(device, event, [4, 7], [kept] * 2, [hyper] * 2, numbers)]
    for capturing, expected in ((True, []), (False, [1])):
        monkeypatch.setattr(watch, "is_capturing", lambda of, now=capturing: now and of == device)
        assert watching.measures()
        assert asked == expected
    assert settled == [(4, kept)]
    assert watching.measures() and asked == [1], "an answer is asked for once"


def test_each_device_is_asked_for_its_own_numbers():
    """Numbers of two devices make no one tensor."""
    number = {0: torch.ones(()), 3: torch.ones((), device="meta"), 5: torch.ones(())}
    walk = SimpleNamespace(
        unsettled=lambda: list(number), kept=lambda k: ([number[k]] * 3, [0.0] * 6)
    )
    watching = Watch(RULES["sgd_sai"], walk)
    watching.ask()
    assert [(q.device.type, q.positions) for q in watching._questions] == [
        ("cpu", [0, 5]),
        ("meta", [3]),
    ]


def test_nobody_asks_twice(monkeypatch):
    number = torch.ones(())
    walk = SimpleNamespace(unsettled=lambda: [0], kept=lambda k: ([number] * 3, [0.0] * 6))
    for capturing in (False, True):
        monkeypatch.setattr(watch, "is_capturing", lambda device, now=capturing: now)
        watching = Watch(RULES["sgd_sai"], walk)
        watching.ask()
        watching.ask()
        assert len(watching._questions) == (0 if capturing else 1)


def test_the_stream_that_may_be_captured_is_that_of_the_device(monkeypatch):
    current = []

    @contextmanager
    def on(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current == [1])
    capturing = [graphs.is_capturing(torch.device("cuda", index)) for index in (0, 1)]
    assert capturing == [False, True]


def test_the_interpreter_takes_no_cuda_tensors(monkeypatch):
    module = importlib.import_module("fused_momentum.backends")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(module, "_cuda", lambda: (False, "not for this test"))
    assert choose("auto", "cuda").name == "reference"


@pytest.mark.skipif(EXTENSION is None, reason="its reasons")
@pytest.mark.parametrize("built", [False, True])
def test_cuda_kernels_that_cannot_run_say_why(monkeypatch, built):
    def refuse():
        raise RuntimeError("no driver today")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(native.load()[0], "cuda_devices", refuse)
    (row,) = [row for row in backends() if row.name == "cuda"]
    expected = "no driver today" if built else "this torch is built without CUDA"
    assert (row.available, row.reason) == (False, expected)


@pytest.mark.skipif(EXTENSION is None, reason="its rules")
def test_a_rule_that_the_extension_lacks():
    with pytest.raises(RuntimeError, match=r"has no rule 'newer', only \['sgd'"):
        native.rule_number("newer")

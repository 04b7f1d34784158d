"""FusedSGD against torch.optim.SGD (for-loop), its only twin, on the same gradients."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twin import (
    CASES,
    DTYPES,
    HEAVY,
    LAYOUTS,
    NESTEROV,
    STEPS,
    Case,
    Run,
    Spec,
    assert_as_close_as_torch,
    assert_equal,
    cases,
    compare,
    dtypes,
    param_floor,
    torch_sgd,
)

from fused_momentum import FusedMomentum, FusedNAG, FusedSGD

# --- the same training -----------------------------------------------------------------------


@cases
@dtypes
def test_trains_as_torch(case, dtype):
    ours = Run(FusedSGD, case, dtype).train()
    assert_as_close_as_torch(ours, case, dtype)


@cases
@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable"])
def test_torchs_flags_change_no_bit(case, flag):
    plain = Run(FusedSGD, case, torch.float32).train()
    flagged = Run(FusedSGD, case, torch.float32, **{flag: True}).train()
    assert_equal(plain, flagged)


BASE = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05, "maximize": False}
CHANGES = {"lr": 0.05, "momentum": 0.5, "dampening": 0, "weight_decay": 0.5, "maximize": True}
CHANGES |= {"nesterov": True}


@dtypes
@pytest.mark.parametrize("key", CHANGES)
def test_the_bound_notices_every_hyperparameter(key, dtype):
    base = BASE | ({"dampening": 0} if key == "nesterov" else {})
    ours = Run(FusedSGD, Case(base | {key: CHANGES[key]}), dtype).train()
    with pytest.raises(AssertionError, match="allowed"):
        assert_as_close_as_torch(ours, Case(base), dtype)


CLASSICAL = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
TWINS = {"momentum": (FusedMomentum, CLASSICAL), "nag": (FusedNAG, NESTEROV)}
twins = pytest.mark.parametrize(("cls", "torchs"), TWINS.values(), ids=TWINS)


@dtypes
@twins
def test_classical_forms_visit_torchs_points_while_lr_is_constant(cls, torchs, dtype):
    # v = -lr * buf carries one form into the other; NAG's parameters hold the look-ahead point.
    ours = Run(cls, Case(CLASSICAL), dtype).train()
    theirs = Run(torch_sgd, Case(torchs), dtype).train()
    truth = Run(torch_sgd, Case(torchs), dtype, truth=True).train()
    floors = [param_floor(dtype, truth.largest)] * len(truth.params)
    compare(ours.params, theirs.params, truth.params, floors)


@twins
def test_classical_forms_leave_torchs_points_once_lr_changes(cls, torchs):
    writes = {3: {"lr": 0.05}}
    ours = Run(cls, Case(CLASSICAL, writes=writes), torch.float32).train()
    with pytest.raises(AssertionError, match="allowed"):
        assert_as_close_as_torch(ours, Case(torchs, writes=writes), torch.float32)


# --- random models ---------------------------------------------------------------------------

SHAPES = [(), (0,), (1,), (17,), (3, 0), (5, 9), (4, 3, 2), (2, 4, 3, 3), (1025,), (64, 33)]


@st.composite
def _random_case(draw):
    layout = st.sampled_from(sorted(LAYOUTS))
    spec = st.builds(
        Spec,
        shape=st.sampled_from(SHAPES),
        dtype=st.sampled_from(DTYPES),
        layout=layout,
        grad_layout=layout,
        absent=st.lists(st.integers(0, STEPS - 1), unique=True, max_size=STEPS).map(tuple),
    )
    kwargs = draw(st.sampled_from([HEAVY, NESTEROV, CASES["decay"].kwargs]))
    kwargs = kwargs | {"maximize": draw(st.booleans())}
    groups = tuple({"lr": 0.1 / (g + 1)} for g in range(draw(st.integers(1, 3))))
    return Case(kwargs, tuple(draw(st.lists(spec, min_size=1, max_size=8))), groups)


@given(case=_random_case())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_random_models_train_as_torch(case):
    ours = Run(FusedSGD, case, None).train()
    assert_as_close_as_torch(ours, case, None)


# --- checkpoints -----------------------------------------------------------------------------


SAVE_AT = 3
PAIRS = [(FusedSGD, torch_sgd), (torch_sgd, FusedSGD)]


def _reload(run, cls, through=lambda state_dict: state_dict):
    """A new optimizer over copies of the parameters, loaded from the state_dict of `run`."""
    other = Run(cls, run.case, run.dtype)
    with torch.no_grad():
        for p, q in zip(other.params, run.params, strict=True):
            p.copy_(q)
    other.opt.load_state_dict(through(run.opt.state_dict()))
    return other


def _through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _clone(run, through):
    """Parameters and optimizer copied together."""
    other = copy.copy(run)
    other.params, other.opt = through((run.params, run.opt))
    return other


@cases
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=["ours_to_torch", "torch_to_ours"])
@dtypes
def test_checkpoints_interchange_with_torch(case, source, target, dtype):
    half = Run(source, case, dtype).train(0, SAVE_AT)
    ends = _reload(half, target, copy.deepcopy).train(SAVE_AT)
    assert_as_close_as_torch(ends, case, dtype)


@cases
@dtypes
def test_state_dict_has_the_form_of_torchs(case, dtype):
    run = Run(FusedSGD, case, dtype).train()
    ours, torchs = run.opt.state_dict(), Run(torch_sgd, case, dtype).train().opt.state_dict()
    for a, b in zip(ours["param_groups"], torchs["param_groups"], strict=True):
        assert a.keys() == b.keys()  # torch.distributed.checkpoint asks for all of them
        assert a["params"] == b["params"]
    assert ours["state"].keys() == torchs["state"].keys()
    for index, entry in torchs["state"].items():
        assert ours["state"][index].keys() == entry.keys()
    for p in run.opt.state:
        buffer = run.opt.state[p]["momentum_buffer"]
        assert (buffer.shape, buffer.stride()) == (p.shape, p.stride())
        assert buffer.dtype == torch.promote_types(dtype, torch.float32)


SUBJECTS = {
    "sgd": (FusedSGD, HEAVY),
    "sgd_nesterov": (FusedSGD, NESTEROV),
    "sgd_without_momentum": (FusedSGD, {"lr": 0.1}),
    "momentum": (FusedMomentum, CLASSICAL),
    "nag": (FusedNAG, CLASSICAL),
}
subjects = pytest.mark.parametrize(("cls", "kwargs"), SUBJECTS.values(), ids=SUBJECTS)
WAYS = {
    "state_dict": lambda run, cls: _reload(run, cls),
    "saved_state_dict": lambda run, cls: _reload(run, cls, _through_file),
    "pickle": lambda run, cls: _clone(run, lambda pair: pickle.loads(pickle.dumps(pair))),
    "deepcopy": lambda run, cls: _clone(run, copy.deepcopy),
}


@subjects
@dtypes
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_resuming_equals_never_stopping(cls, kwargs, dtype, way):
    shapes = [(7, 5), (130,), (2, 3, 4, 5), ()]
    changes = [{"absent": (0, 4)}, {"absent": (0, 1, 2, 3)}, {"layout": "channels_last"}, {}]
    specs = tuple(Spec(shape, **change) for shape, change in zip(shapes, changes, strict=True))
    case = Case(kwargs, specs, writes={1: {"lr": 0.05}})
    whole = Run(cls, case, dtype).train()
    half = Run(cls, case, dtype).train(0, SAVE_AT)
    other = way(half, cls).train(SAVE_AT)
    assert_equal(other, whole)
    half.train(SAVE_AT)  # the two share no memory: each ends where the whole run does
    assert_equal(half, whole)
    assert_equal(other, whole)


@subjects
def test_saving_one_buffer_does_not_drag_the_others_along(cls, kwargs):
    run = Run(cls, Case(kwargs, (Spec((4,)), Spec((100_000,)))), torch.float32).train(0, 1)
    file = io.BytesIO()
    torch.save(run.opt.state_dict()["state"].get(0), file)
    assert file.tell() < 100_000  # 16 bytes and the container; the other buffer has 400,000

"""Whatever happens between steps, and in whatever order, a plan does what a fresh walk would."""

import pytest
import torch
from cases import (
    VARIANTS,
    backends,
    compiled,
    device_of,
    differing,
    one_thread,  # noqa: F401  a fixture for every test here
)
from events import EVENTS, SOME, assert_untouched, set_grads, start, with_copies
from hypothesis import given, settings
from hypothesis import strategies as st
from spoilers import SPOILERS

MOST_STEPS = 8


def _steps_of(events):
    """New gradients or the old ones, what happens, and what is then updated."""
    step = st.tuples(
        st.booleans(),
        st.lists(st.sampled_from(events), max_size=3),
        st.sampled_from(["all", "all", "some", "none"]),
    )
    return st.lists(step, min_size=2, max_size=MOST_STEPS)


def _play(variant, backend, forms, steps, flatten, on_gpu):
    """A run, and the errors that were raised in it; on_gpu: it, or the other, is there."""
    run, abandoned, errors = start(variant, backend, forms, flatten=flatten), [], []

    def attempt(action, *args):
        try:
            return action(*args)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            # A step that an overflow skips looks at nothing where the host knows of it, and at
            # everything where only the device does.
            if not (on_gpu and getattr(run.opt, "found_inf", 0)):
                errors.append((type(error), str(error)))

    for step, (fresh, events, updated) in enumerate(steps):
        if fresh or step == 0:
            set_grads(run, step)
        for event in events:
            abandoned += with_copies(attempt(EVENTS[event], run))
        if updated == "all":
            attempt(run.opt.step)
        elif updated == "some":
            attempt(run.opt.step_params, run.params[:3])
    assert_untouched(abandoned)
    return run, errors


@compiled
@given(
    variant=st.sampled_from(list(VARIANTS.values())),
    forms=st.permutations(SOME),
    steps=_steps_of(sorted(EVENTS)),
    flatten=st.sampled_from([False, False, True, "grads"]),
)
@settings(max_examples=250, deadline=None, derandomize=True)
def test_any_sequence_of_events(backend, variant, forms, steps, flatten):
    (run, errors), (truth, expected) = (
        _play(variant, name, forms, steps, flatten, device_of(backend) == "cuda")
        for name in (backend, "reference")
    )
    assert errors == expected
    assert not differing(run, truth)


def _attempt(failed, action, *args):
    """What an action returns; where it raises, so much more is noted in ``failed``."""
    try:
        return action(*args)
    except Exception as error:
        failed.append(f"{type(error).__name__}: {error}")


def _play_spoiled(variant, backend, steps, flatten, on_gpu):
    """As _play: a run, which of its steps were refused, and why."""
    run, abandoned, refused, why = start(variant, backend, flatten=flatten), [], [], []
    for step, (fresh, names, updated) in enumerate(steps):
        if fresh or step == 0:
            _attempt([], set_grads, run, step)
        for name in sorted(names, key="grad_given_back".__eq__):
            gone = _attempt([], (EVENTS | SPOILERS)[name], run) or ()
            gone = [t for t in gone if isinstance(t, torch.Tensor) and t.layout == torch.strided]
            abandoned += with_copies(gone)
        if updated != "none":
            params = None if updated == "all" else run.params[:3]
            count = len(why)
            _attempt(why, run.opt.step_params if params else run.opt.step, *filter(None, [params]))
            if not (on_gpu and getattr(run.opt, "found_inf", 0)):  # as in _play
                refused.append(len(why) > count)
        if "grad_given_back" in names:
            run.params[1].grad = None  # nobody can read it
    assert_untouched(abandoned)
    return run, refused, why


@compiled
@given(
    variant=st.sampled_from(list(VARIANTS.values())),
    steps=_steps_of(sorted(EVENTS | SPOILERS)),
    flatten=st.sampled_from([False, False, True, "grads"]),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_sequence_of_events_and_spoilers(backend, variant, steps, flatten):
    """Where two things are wrong at once, it does not matter which is named."""
    (run, refused, why), (truth, expected, reasons) = (
        _play_spoiled(variant, name, steps, flatten, device_of(backend) == "cuda")
        for name in (backend, "reference")
    )
    assert refused == expected, (why, reasons)
    assert not differing(run, truth)


# The numbers that say whether a tensor has been measured reach the host a step later: by then they
# may be those of another one. Both walks learn it in the same way, so neither is an oracle.
@pytest.mark.parametrize(
    "event", ["all_states_cleared", "state_deleted", "kept_numbers_deleted", "parameter"]
)
@pytest.mark.parametrize("name", ["sgd_sai", "sgd_sai-gsnr_max-official"])
@backends
def test_a_tensor_that_begins_anew_is_measured_anew(backend, name, event):
    run, other = (start(VARIANTS[name], backend) for _ in range(2))
    set_grads(run, 0)
    run.opt.step()
    EVENTS[event](run)
    for r in (run, other):
        set_grads(r, 1)
        r.opt.step()
    state = run.opt.state[run.params[1]]
    assert state["stage"] == 3
    assert torch.equal(state["gsnr"], other.opt.state[other.params[1]]["gsnr"])


@backends
def test_what_is_measured_of_a_tensor_that_is_gone_is_forgotten(backend):
    run = start(VARIANTS["sgd_sai"], backend)
    set_grads(run, 0)
    run.opt.step()
    del run.opt.param_groups[0]["params"][2:]
    set_grads(run, 1)
    run.opt.step()
    assert run.opt.state[run.params[1]]["stage"] == 3

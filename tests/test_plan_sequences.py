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

MOST_STEPS = 8

# New gradients or the old ones, what happens, and what is then updated.
_steps = st.lists(
    st.tuples(
        st.booleans(),
        st.lists(st.sampled_from(sorted(EVENTS)), max_size=3),
        st.sampled_from(["all", "all", "some", "none"]),
    ),
    min_size=2,
    max_size=MOST_STEPS,
)


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
    steps=_steps,
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

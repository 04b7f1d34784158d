"""Learning-rate windows: properties, fields and errors, torch's schedulers, the figure."""

import copy
import io
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from fused_momentum import windows
from fused_momentum.windows import ORDERS, SHAPES, UNITS, Window
from fused_momentum.windows.__main__ import main

# --- properties of "fixed" ----------------------------------------------------------------------

shapes = st.sampled_from(SHAPES)
fractions = st.floats(0, 1) | st.sampled_from((0.0, 0.5, 0.9, 1.0))


@st.composite
def fixed_windows(draw, **fixed):
    shape = draw(shapes)
    unit = draw(st.sampled_from(UNITS))
    fields = {
        "shape": shape,
        "minimum": draw(fractions),
        "power": draw(st.floats(0.01, 0.99 if shape == "exponential" else 20)),
        "half": draw(st.booleans()),
        "epochs": draw(st.integers(2, 12)),
        "steps_per_epoch": draw(st.integers(1, 12)),
        "unit": unit,
        "stairs": draw(st.sampled_from((1, 3, 4, 7))) if unit == "steps" else 1,
        "flat": draw(fractions),
        "order": draw(st.sampled_from(ORDERS)),
    }
    return Window(**{**fields, **fixed})


def one_window(window):
    """The L values of a window, one for each count."""
    return [window(1 + i * window._steps_per_count) for i in range(window.length)]


@settings(deadline=None, max_examples=400)
@given(fixed_windows())
def test_from_minimum_to_one(window):
    assert all(window.minimum <= f <= 1 for f in one_window(window))


@settings(deadline=None, max_examples=400)
@given(fixed_windows(half=True))
def test_half_starts_at_one_and_falls(window):
    values = one_window(window)
    assert values[0] == 1
    assert values == sorted(values, reverse=True)


@settings(deadline=None, max_examples=200)
@given(fixed_windows(half=False, order="kronecker"))
def test_full_kronecker_is_symmetric(window):
    values = one_window(window)
    assert values == values[::-1]


@settings(deadline=None, max_examples=200)
@given(
    fixed_windows(half=False, order="uniform"),
    st.sampled_from((2, 4, 8)),
    st.sampled_from((1, 2, 4)),
)
def test_full_is_symmetric_about_its_peak(window, epochs, steps_per_epoch):
    # Powers of two make every phase exact, hence equality.
    window = replace(window, epochs=epochs, steps_per_epoch=steps_per_epoch)
    values = one_window(window)
    assert values[1:] == values[:0:-1]
    if window.length > 1:
        assert values[window.length // 2] == 1
    if window.flat < 1 and window.shape != "constant":
        assert values[0] == window.minimum + (1 - window.minimum) * window._shape(1.0)


@settings(deadline=None, max_examples=200)
@given(fixed_windows(), st.integers(1, 200), st.integers(1, 10**12))
def test_restarts_for_ever(window, t, times):
    per_count = window.steps_per_epoch if window.unit == "epochs" else 1
    assert window(t + times * window.length * per_count) == window(t)
    # The factor changes with the count only.
    assert window(t) == window((t - 1) // per_count * per_count + 1)


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("power", (0.25, 0.9))
def test_shapes_end_at_zero_and_the_minimum_is_the_limit(shape, power):
    window = Window(shape, power=power, minimum=0.125, epochs=10**6)
    assert window._shape(0.0) == 1
    # cos(pi / 2) is 6e-17 in float64; its root of order 4 is 1e-4.
    assert window._shape(1.0) == (math.cos(math.pi / 2) ** power if "cosine" in shape else 0)
    # One step before the end the phase is 1e-6 away: the steepest shape, (1e-6)^(1/4), is at 0.03.
    assert 0.125 <= window(10**6) < 0.125 + 0.04


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_stairs_have_equal_height(shape):
    # At the edges of 4 stairs, phi = 0, 1/4, 1/2, 3/4, whose multiples by 4 are exact.
    window = Window(shape, power=0.5, epochs=4, steps_per_epoch=25, stairs=4)
    edges = [window(1 + 25 * i) for i in range(4)]
    if shape == "polynomial":
        assert edges == [(1 - i / 4) ** 0.5 for i in range(4)]
    elif shape != "logistic_mid":  # a sum of logistics has no edges
        # cos(pi / 2)^(1/2) / 4 = 2e-9
        assert edges == pytest.approx([1, 0.75, 0.5, 0.25], rel=0, abs=2.1e-9)


def test_no_window_is_one():
    window = Window()
    assert window.rc_cfg == (0, 0, 0, 2, 1, 1000, 1, 1, 0)
    assert Window.from_rc_cfg((0, 0, 0, -1, 1, 1000, 1, 1, 0))(7) == 1  # n does not matter
    assert {window(t) for t in (1, 2, 999, 1000, 1001, 10**9)} == {1.0}


# --- fields and errors --------------------------------------------------------------------------


def test_windows_are_values():
    window = Window("logistic_mid", epochs=3, steps_per_epoch=3, order="kronecker", compat="v1")
    window(1)
    for other in (pickle.loads(pickle.dumps(window)), copy.deepcopy(window)):
        assert other == window
        assert hash(other) == hash(window)
        assert other(5) == window(5)
    with pytest.raises(AttributeError):
        window.power = 3


def test_numbers_of_numpy_become_numbers_of_python():
    window = Window(
        "exponential", minimum=np.float32(0.1), power=np.float32(0.3), epochs=np.int8(9)
    )
    plain = Window(
        "exponential", minimum=float(np.float32(0.1)), power=float(np.float32(0.3)), epochs=9
    )
    assert repr(window) == repr(plain)
    assert type(window(np.int64(3))) is float
    assert window(np.int64(3)) == plain(3)


def test_a_kronecker_window_is_drawn_once():
    window = Window("raised_cosine", epochs=7, steps_per_epoch=11, order="kronecker", power=1.25)
    drawn = windows._kronecker.cache_info().misses
    for t in range(1, 200):
        replace(window)(t)
    assert windows._kronecker.cache_info().misses == drawn + 1


GOOD = dict(zip(windows.RC_CFG, (1, 0, 0.1, 2, 1, 4, 3, 1, 0.5), strict=True))
BAD_ENTRIES = [
    ({"rcm": 7}, ValueError, r"shape \(rc_cfg\[0\], rcm\) is 7; needed: an integer from 0 to 6"),
    ({"rcm": -1}, ValueError, r"rc_cfg\[0\], rcm\) is -1"),
    ({"rcm": 1.0}, TypeError, r"rc_cfg\[0\], rcm\) is 1.0"),
    ({"inseq": 2}, ValueError, r"order \(rc_cfg\[1\], inseq\) is 2; needed: .* from 0 to 1"),
    ({"x": 1.5}, ValueError, r"minimum \(rc_cfg\[2\], x\) is 1.5; needed: a number from 0 to 1"),
    ({"x": math.nan}, ValueError, r"rc_cfg\[2\], x\) is nan"),
    ({"x": "0.1"}, TypeError, r"rc_cfg\[2\], x\) is '0.1'"),
    ({"n": 0}, ValueError, r"power \(rc_cfg\[3\], n\) is 0; needed: .*, a number above 0"),
    ({"n": math.inf}, ValueError, r"rc_cfg\[3\], n\) is inf"),
    ({"n": None}, TypeError, r"rc_cfg\[3\], n\) is None"),
    ({"rcm": 0, "n": math.nan}, ValueError, r"rc_cfg\[3\], n\) is nan"),
    ({"rcm": 3, "n": 1}, ValueError, r"rc_cfg\[3\], n\) is 1; .*exponential.* above 0 and below 1"),
    ({"rcm": 5, "n": 1e-20}, ValueError, r"rc_cfg\[3\], n\) is 1e-20; .*logistic falls"),
    ({"rcm": 6, "n": 1e-20}, ValueError, r"rc_cfg\[3\], n\) is 1e-20; .*logistic falls"),
    ({"m": 2}, ValueError, r"half \(rc_cfg\[4\], m\) is 2; needed: an integer from 0 to 1"),
    ({"tau": 0}, ValueError, r"epochs \(rc_cfg\[5\], tau\) is 0; needed: an integer of 1 or more"),
    ({"tau": 2.5}, TypeError, r"rc_cfg\[5\], tau\) is 2.5"),
    ({"tau": 1, "cfact": 0}, ValueError, r"rc_cfg\[5\], tau\) is 1; needed: .* 2 or more"),
    ({"spe": 0}, ValueError, r"steps_per_epoch \(rc_cfg\[6\], spe\) is 0"),
    ({"tau": 1, "spe": 1}, ValueError, r"rc_cfg\[6\], spe\) is 1; needed: 2 or more steps"),
    ({"rcm": 0, "tau": 1, "spe": 1}, ValueError, r"rc_cfg\[6\], spe\) is 1"),
    ({"cfact": -1}, ValueError, r"unit \(rc_cfg\[7\], cfact\) is -1; needed: an integer of 0"),
    ({"cfact": 3.0}, TypeError, r"rc_cfg\[7\], cfact\) is 3.0"),
    ({"e": -0.1}, ValueError, r"flat \(rc_cfg\[8\], e\) is -0.1; needed: a number from 0 to 1"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD_ENTRIES)
def test_a_bad_entry_is_named(wrong, error, message):
    assert Window.from_rc_cfg(tuple(GOOD.values()))
    with pytest.raises(error, match=message):
        Window.from_rc_cfg(tuple({**GOOD, **wrong}.values()))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Window.from_rc_cfg((1, 0, 0)),
            ValueError,
            r"has 3 entries, \(1, 0, 0\); needed: .*e\)",
        ),
        (lambda: Window.from_rc_cfg("cosine"), TypeError, "rc_cfg is 'cosine'; needed: a tuple"),
        (lambda: Window.from_rc_cfg(7), TypeError, "rc_cfg is 7"),
        (lambda: Window("cosine"), ValueError, "shape .* is 'cosine'; needed: one of 'constant'"),
        (lambda: Window(1), TypeError, "shape .* is 1; needed: one of"),
        (lambda: Window(half=1), TypeError, "half .* is 1; needed: True or False"),
        (lambda: Window(unit="epoch"), ValueError, "unit .* is 'epoch'; needed: one of 'epochs'"),
        (lambda: Window(order="random"), ValueError, "order .* is 'random'"),
        (lambda: Window(compat="v2"), ValueError, "compat is 'v2'; needed: one of 'fixed', 'v1'"),
        (lambda: Window(stairs=2), ValueError, r"stairs \(rc_cfg\[7\], cfact\) is 2; .*3 or more"),
        (lambda: Window(stairs=3, unit="epochs"), ValueError, "stairs .* is 3; .*unit 'steps'"),
        (lambda: Window()(0), ValueError, "t is 0; needed: a step, 1 or more"),
        (lambda: Window()(1.5), TypeError, "float"),
    ],
)
def test_a_bad_argument_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- as a torch scheduler -----------------------------------------------------------------------

L, LR = 48, 0.3
RESTARTS = lr_scheduler.CosineAnnealingWarmRestarts
# The window, torch's scheduler, and how many steps they are the same for.
TWINS = {
    "cosine": (
        Window("raised_cosine", epochs=6, steps_per_epoch=8),
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=L),
        L,
    ),
    "cosine with a minimum": (
        Window("raised_cosine", minimum=0.1, epochs=L),
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=L, eta_min=0.1 * LR),
        L,
    ),
    "cosine with restarts": (
        Window("raised_cosine", minimum=0.1, epochs=L),
        lambda opt: RESTARTS(opt, T_0=L, eta_min=0.1 * LR),
        5 * L // 2,
    ),
    "cosine with restarts in every epoch": (
        Window("raised_cosine", epochs=2, steps_per_epoch=L, unit="one_epoch"),
        lambda opt: RESTARTS(opt, T_0=L),
        2 * L,
    ),
    "linear": (
        Window("polynomial", power=1, minimum=0.1, epochs=L),
        lambda opt: lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=L),
        L,
    ),
    "polynomial": (
        Window("polynomial", power=3, epochs=L),
        lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=L, power=3),
        L,
    ),
}


def run(make_scheduler, steps, resume_at=None):
    """Parameters and learning rates of a plain loop; saved and loaded before step resume_at."""

    def make(param):
        opt = torch.optim.SGD([param], lr=LR, momentum=0.9)
        return opt, make_scheduler(opt)

    param = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
    opt, scheduler = make(param)
    params, lrs = [], []
    for step in range(steps):
        if step == resume_at:
            torch.save((opt.state_dict(), scheduler.state_dict()), file := io.BytesIO())
            file.seek(0)
            opt, scheduler = make(param)
            for part, state in zip(
                (opt, scheduler), torch.load(file, weights_only=True), strict=True
            ):
                part.load_state_dict(state)
        lrs.append(opt.param_groups[0]["lr"])
        param.grad = param.detach() - 0.5
        opt.step()
        scheduler.step()
        params.append(param.detach().clone())
    return torch.stack(params), torch.tensor(lrs, dtype=torch.float64)


@pytest.mark.parametrize(("window", "twin", "steps"), TWINS.values(), ids=TWINS)
def test_scheduler_is_torchs(window, twin, steps):
    params, lrs = run(window.scheduler, steps)
    torch_params, torch_lrs = run(twin, steps)
    # torch's chainable forms multiply the last lr by a quotient: at most ten roundings of 2^-53 a
    # step, each relative to LR, so 48 * 10 * 2^-53 * LR = 2e-14 in lr. The loop is a contraction
    # of gradients below 2, gain 1 / (1 - 0.9): below 2e-14 * 2 * 10 * 2 = 1e-12 in the parameters.
    assert (lrs - torch_lrs).abs().max() < 2e-14
    assert (params - torch_params).abs().max() < 1e-12
    assert lrs.max() == LR
    assert lrs.min() < 0.2 * LR


@pytest.mark.parametrize("order", ORDERS)
def test_scheduler_resumes_and_pickles(order):
    window = Window("raised_cosine", epochs=3, steps_per_epoch=5, order=order)
    whole = run(window.scheduler, 40)
    for resumed, straight in zip(run(window.scheduler, 40, resume_at=22), whole, strict=True):
        assert torch.equal(resumed, straight)
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = pickle.loads(pickle.dumps(window.scheduler(opt)))
    assert scheduler.get_last_lr() == [LR]


# --- figure -------------------------------------------------------------------------------------


def test_plot_from_the_command_line(tmp_path):
    out = tmp_path / "windows.png"
    command = [sys.executable, "-m", "fused_momentum.windows", "plot", "--out", out]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_plot_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    out = tmp_path / "absent" / "windows.png"
    with pytest.raises(SystemExit):
        main(["plot", "--out", str(out)])
    assert f"--out {out}" in capsys.readouterr().err
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        main(["plot", "--out", str(tmp_path / "windows.png")])
    with pytest.raises(SystemExit):
        main([])

"""Reproduce the published numbers of an optimizer article: SGD, momentum, NAG, Newton, regression.

The function is f(x) = sin x + x^2 / 10 with its minimum at x* = -1.30644. A run has converged when
|x - x*| <= 1e-6 in float32, tested before the update. Run it from the repository root:

    python examples/optimizer_article.py
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

import fused_momentum as fm

MINIMUM = -1.306440008369511  # the root of f' next to -1.3, in float64
TOLERANCE = 1e-6
NEWTON = """-5.94388576 -7.79433605 -6.54310103 -5.79428433 -6.81783809 -6.10875844
             2.84660556 -1.42425821 -1.30751773 -1.30644013 -1.30644001 -1.30644001"""
SGD = "-8 -6.2545 -6.0032 -5.7636 -5.4789 -5.0768 -4.4178 -3.2439 -1.6003 -1.2507 -1.3152 -1.3050"
LOSSES = {0: 20.0717, 50: 4.7583, 100: 1.7357, 150: 1.1392, 200: 1.0214, 250: 0.9982, 400: 0.9924}
FIGURE = Path(__file__).parent / "figures" / "optimizer_article.png"


def f(x):
    """The objective, sin x + x^2 / 10; works on tensors and numpy arrays."""
    return (torch.sin(x) if isinstance(x, torch.Tensor) else np.sin(x)) + x * x / 10


@dataclass
class Trace:
    """The points a run visited, the start first, and the updates it took (None: not converged)."""

    points: list[float]
    updates: int | None = None

    @property
    def step(self):
        """The step on which the test passed, counting the first step as 1."""
        return None if self.updates is None else self.updates + 1


def descend(optimizer_class, start, max_updates=400, test_iterate=False, **options):
    """Minimise f from `start`; `test_iterate` looks at the iterate instead of what is stored.

    The two differ for FusedNAG only, whose parameter holds the look-ahead point x + mu v.
    """
    x = torch.nn.Parameter(torch.tensor(float(start)))
    optimizer = optimizer_class([x], **options)
    trace = Trace(points=[])
    for update in range(max_updates + 1):
        if test_iterate:
            optimizer.eval()
        trace.points.append(x.item())
        if test_iterate:
            optimizer.train()
        if abs(trace.points[-1] - MINIMUM) <= TOLERANCE:
            trace.updates = update
            break
        if update < max_updates:
            optimizer.zero_grad()
            f(x).backward()
            optimizer.step()
    return trace


def newton(start=-5.0, iterations=12):
    """Newton's method on f' in float64: x <- x - f'(x) / f''(x)."""
    points, x = [], start
    for _ in range(iterations):
        x -= (math.cos(x) + x / 5) / (0.2 - math.sin(x))
        points.append(x)
    return points


@dataclass
class Regression:
    """Losses and gradients (slope, intercept) per iteration, the line found and the best line."""

    losses: list[float]
    first_gradients: tuple[float, float]
    line: tuple[float, float]
    least_squares: tuple[float, float]


def regression(iterations=50_000, lr=0.05):
    """Fit y = slope x + intercept by full-batch FusedSGD, in float64, and by least squares."""
    rng = np.random.RandomState(0)
    x = 2 * rng.rand(100, 1)
    y = 4 + 3 * x + rng.randn(100, 1)
    slope, intercept = (
        torch.nn.Parameter(torch.tensor(rng.randn() * scale, dtype=torch.float64))
        for scale in (12, -9)
    )
    best, *_ = np.linalg.lstsq(np.hstack([x, np.ones_like(x)]), y, rcond=None)

    optimizer = fm.FusedSGD([slope, intercept], lr=lr)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    losses, first_gradients = [], None
    for _ in tqdm(range(iterations), desc="linear regression", leave=False):
        optimizer.zero_grad()
        loss = (slope * inputs + intercept - targets).square().mean()
        loss.backward()
        losses.append(loss.item())
        first_gradients = first_gradients or (slope.grad.item(), intercept.grad.item())
        optimizer.step()
    line = (slope.item(), intercept.item())
    return Regression(losses, first_gradients, line, tuple(best.ravel().tolist()))


def bytes_per_parameter(dtype=torch.bfloat16, count=4096):
    """Bytes of weight + gradient + momentum that one parameter costs while it trains."""
    weights = torch.nn.Parameter(torch.zeros(count, dtype=dtype))
    optimizer = fm.FusedSGD([weights], lr=0.1, momentum=0.9, state_dtype=dtype)
    weights.sum().backward()
    optimizer.step()
    kept = (weights, weights.grad, optimizer.state[weights]["momentum_buffer"])
    return sum(tensor.nbytes for tensor in kept) / count


@dataclass
class Article:
    """Everything the article publishes, measured here."""

    traces: dict[str, Trace]
    newton: list[float]
    regression: Regression
    bytes_per_parameter: float


def measure(regression_iterations=50_000):
    """Run every experiment of the article."""
    nag = {"lr": 1.0, "momentum": 0.9}
    nesterov = {**nag, "nesterov": True}
    traces = {
        "SGD from -8": descend(fm.FusedSGD, -8, lr=1.0),
        "SGD from 8": descend(fm.FusedSGD, 8, lr=1.0, max_updates=20),
        "momentum from 8": descend(fm.FusedMomentum, 8, lr=0.1, momentum=0.9),
        "momentum from -8": descend(fm.FusedMomentum, -8, lr=0.1, momentum=0.9),
        "NAG from -8": descend(fm.FusedNAG, -8, **nag),
        "NAG from 8": descend(fm.FusedNAG, 8, **nag),
        "NAG iterate from -8": descend(fm.FusedNAG, -8, test_iterate=True, **nag),
        "NAG iterate from 8": descend(fm.FusedNAG, 8, test_iterate=True, **nag),
        "NAG torch form from 8": descend(fm.FusedSGD, 8, **nesterov),
        "torch.optim.SGD from 8": descend(torch.optim.SGD, 8, **nesterov),
    }
    return Article(traces, newton(), regression(regression_iterations), bytes_per_parameter())


def descent_rows(traces):
    """(method, settings, start, published, measured) of the runs on f."""
    stuck = traces["SGD from 8"].points[-1]
    momentum, nag = "FusedMomentum", "FusedNAG, exact look-ahead"
    slow, fast = "lr 0.1, mu 0.9", "lr 1.0, mu 0.9"

    def steps(name):
        return f"{traces[name].step} steps"

    def nag_steps(start):
        iterate = traces[f"NAG iterate from {start}"].step
        return f"{steps(f'NAG from {start}')} (tested on the iterate: {iterate})"

    torch_form = steps("NAG torch form from 8")
    torch_step = traces["torch.optim.SGD from 8"].step
    sgd_points = " ".join(f"{x:.4f}" for x in traces["SGD from -8"].points)
    return [
        ("FusedSGD", "lr 1.0", "-8", "16 updates", f"{traces['SGD from -8'].updates} updates"),
        ("", "x", "", SGD + " -1.3067 -1.3064 ...", sgd_points),
        ("", "20 steps", "8", "3.83747, f 0.83156", f"{stuck:.5f}, f {f(np.float64(stuck)):.5f}"),
        (momentum, slow, "8", "216 steps", steps("momentum from 8")),
        ("", "", "-8", "222 steps: not this rule", steps("momentum from -8")),
        (nag, fast, "-8", "34 steps", nag_steps(-8)),
        ("", "", "8", "27 steps", nag_steps(8)),
        ("FusedSGD, nesterov", fast, "8", "27, as torch", f"{torch_form}, torch {torch_step}"),
    ]


def other_rows(article):
    """(method, settings, start, published, measured) of Newton, the regression and the memory."""
    fit = article.regression
    newton_points = " ".join(f"{x:.8f}" for x in article.newton)
    seen = {i: fit.losses[i] for i in LOSSES if i < len(fit.losses)}
    gradients = ", ".join(f"{g:.4f}" for g in fit.first_gradients)
    best = "slope {}, intercept {}".format(*fit.least_squares)
    distance = max(abs(a - b) for a, b in zip(fit.line, fit.least_squares, strict=True))
    published_best = "slope 2.968467510701021, intercept 4.222151077447227"
    updates = f"{len(fit.losses):,} updates"
    memory = f"{article.bytes_per_parameter:g} GB"
    return [
        ("Newton on f'", "float64", "-5", " ".join(NEWTON.split()), newton_points),
        ("Linear regression", "losses", "", joined(LOSSES), joined(seen)),
        ("", "first gradients", "", "-2.2857, 2.6574", gradients),
        ("", "least squares", "", published_best, best),
        ("", updates, "", "within 1e-13 of least squares", f"within {distance:.1e}"),
        ("Memory of training", "1e9 parameters, bf16", "", "3 values each, 6 GB", memory),
    ]


def joined(losses):
    """The losses in one line, as iteration:loss."""
    return " ".join(f"{i}:{loss:.4f}" for i, loss in losses.items())


def print_table(article):
    """Print what the article says beside what our classes do."""
    numbers = [Column(name, overflow="fold") for name in ("published", "measured")]
    table = Table("method", "settings", "start", *numbers, show_lines=True)
    for row in descent_rows(article.traces) + other_rows(article):
        table.add_row(*row)
    Console().print(table)


def draw(article, path):
    """Draw where the runs went, how fast they closed in, and the regression's loss."""
    figure, (where, distance, loss) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    grid = np.linspace(-9, 9, 400)
    where.plot(grid, f(grid), color="0.6")
    for name in ("SGD from -8", "SGD from 8", "NAG from 8"):
        points = np.array(article.traces[name].points)
        where.plot(points, f(points), "o-", markersize=3, linewidth=0.8, label=name)
    where.set(xlabel="x", ylabel="f(x)", title="f(x) = sin x + x² / 10")

    for name in ("SGD from -8", "momentum from -8", "momentum from 8", "NAG from -8", "NAG from 8"):
        points = np.array(article.traces[name].points)
        distance.semilogy(np.abs(points - MINIMUM), label=name)
    distance.axhline(TOLERANCE, color="0.6", linestyle="--")
    distance.set(xlabel="updates", ylabel="|x - x*|", title="Distance to the minimum")

    loss.plot(article.regression.losses[:500], label="FusedSGD, lr 0.05")
    loss.plot(LOSSES.keys(), LOSSES.values(), "k.", label="published")
    loss.set(xlabel="iteration", ylabel="mean squared error", title="Linear regression")
    for axes in (where, distance, loss):
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    """Measure, print the table, draw the figure; return the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regression-iterations", type=int, default=50_000)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(argv)

    article = measure(options.regression_iterations)
    print_table(article)
    print("The published NAG counts test the look-ahead point, which FusedNAG's parameter holds.")
    draw(article, options.figure)
    print(f"figure: {options.figure}")
    return article


if __name__ == "__main__":
    main()

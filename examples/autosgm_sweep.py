"""Train the digits CNN of train_digits.py with one AutoSGM optimizer in many settings.

Smoothing, zero, window and numerator of the learning rate are settings of a single class. All runs
start from the same weights and see the same batches. Run it from the repository root:

    python examples/autosgm_sweep.py --epochs 10
"""

import argparse
import copy
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from train_digits import Run, alexnet_for_digits, train

from fused_momentum import FusedAutoSGM, LearningRate, Smoothing, Window

FIGURE = Path(__file__).parent / "figures" / "autosgm_sweep.png"
STEPS_PER_EPOCH = 44  # of 32 images


def settings(epochs):
    """Keywords of each run, by title of its panel and name."""
    plain, rate = Smoothing(0.0), LearningRate(1e-3)
    cosine = Window("raised_cosine", epochs=epochs, steps_per_epoch=STEPS_PER_EPOCH)
    other = 1 - (2 * (1 - 0.9)) ** 0.5  # a zero that the README of AutoSGM suggests
    smoothing = Smoothing(0.9, numerator_pole=0.99)  # 0.9999 needs more steps than this takes

    def annealed(smoothing, numerator="unity", mu=1e-3):
        return {
            "learning_rate": LearningRate(mu, numerator=numerator),
            "smoothing": smoothing,
            "window": cosine,
        }

    return {
        "What the gradient goes through": {
            "plain SGM": {"learning_rate": LearningRate(0.02, False), "smoothing": plain},
            "RMSProp-like": {"learning_rate": rate, "smoothing": plain},
            "RMSProp-like, cosine": annealed(plain),
            "heavy ball, cosine": annealed(Smoothing(0.9)),
            "Nesterov, cosine": annealed(Smoothing.nesterov(0.9)),
            f"zero {other:.2f}, cosine": annealed(Smoothing(0.9, other)),
        },
        "Numerator of the learning rate, and mu": {
            "unity, 0.001": annealed(smoothing),
            "parcor, 0.01": annealed(smoothing, "parcor", 1e-2),
            "huber_parcor, 0.01": annealed(smoothing, "huber_parcor", 1e-2),
            "moment, 0.01": annealed(smoothing, "moment", 1e-2),
            "huber_unity, 0.001": annealed(smoothing, "huber_unity"),
        },
    }


# Grey print: the lines of a panel differ in lightness, width and dashes.
STYLES = (
    {"color": "0.7", "linestyle": "-", "linewidth": 3},
    {"color": "black", "linestyle": "-", "linewidth": 1},
    {"color": "0.4", "linestyle": "--", "linewidth": 2},
    {"color": "black", "linestyle": ":", "linewidth": 2},
    {"color": "0.5", "linestyle": "-.", "linewidth": 1.5},
    {"color": "black", "linestyle": (0, (8, 3)), "linewidth": 1},
)


def sweep(epochs):
    """Train all runs side by side; return them by title of their panel and name."""
    torch.manual_seed(0)
    start = alexnet_for_digits()
    panels = {}
    for title, rows in settings(epochs).items():
        panels[title] = {}
        for name, keywords in rows.items():
            model = copy.deepcopy(start)
            panels[title][name] = Run(model, FusedAutoSGM(model.parameters(), **keywords))
    train([run for runs in panels.values() for run in runs.values()], epochs)
    return panels


def draw(panels, path):
    """Draw the losses, each the mean over the last epoch, in one panel for each title."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(12, 4.5), sharey=True, layout="constrained"
    )
    for axis, (title, runs) in zip(axes, panels.items(), strict=True):
        for (name, run), style in zip(runs.items(), STYLES, strict=False):
            losses = torch.tensor(run.losses).unfold(0, STEPS_PER_EPOCH, 1).mean(1)
            steps = range(STEPS_PER_EPOCH, STEPS_PER_EPOCH + len(losses))
            axis.semilogy(steps, losses, label=f"{name}: {run.accuracy:.1%}", **style)
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
        axis.legend(title="test accuracy", handlelength=4)
    axes[0].set_ylabel("cross entropy, mean over an epoch")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    """Train, print and draw all runs; return them by title and name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(argv)
    panels = sweep(options.epochs)
    for title, runs in panels.items():
        print(title)
        for name, run in runs.items():
            last = sum(run.losses[-STEPS_PER_EPOCH:]) / STEPS_PER_EPOCH
            print(f"  {name:>22}: last loss {last:.4f}, test accuracy {run.accuracy:.1%}")
    draw(panels, options.figure)
    print(f"figure: {options.figure}")
    return panels


if __name__ == "__main__":
    main()

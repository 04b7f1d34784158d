"""Train a small AlexNet-style CNN on scikit-learn's digits with FusedSGD and torch.optim.SGD.

Both start from the same weights and see the same batches and dropout masks, so that the losses
differ by rounding only. (Much longer runs part ways, as any two roundings of one rule do: sooner or
later a ReLU or a max-pool switches in one of them.) Run it from the repository root:

    python examples/train_digits.py --epochs 10 --optimizer-args lr=0.02 nesterov=True
"""

import argparse
import ast
import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

import fused_momentum as fm

OPTIMIZER_ARGS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
FIGURE = Path(__file__).parent / "figures" / "train_digits.png"


def digits():
    """(train images, train labels, test images, test labels); images [n, 1, 8, 8] in [-1, 1]."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(labels)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    return images[train], labels[train], images[test], labels[test]


def alexnet_for_digits():
    """AlexNet's stacks at the size of 8x8 images: [n, 1, 8, 8] -> logits [n, 10]."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(32 * 2 * 2, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model


@dataclass
class Run:
    """One model with its optimizer, and what training it recorded."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def train_on(self, images, labels, dropout_seed):
        """One forward, backward and step; only the step is timed."""
        torch.manual_seed(dropout_seed)
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.step_seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    @torch.no_grad()
    def test_on(self, images, labels):
        """Set the fraction of images that the model classifies correctly."""
        self.model.eval()
        self.accuracy = (self.model(images).argmax(1) == labels).float().mean().item()


def train(runs, epochs, batch_size=32):
    """Train all runs side by side on the same batches, then test them."""
    train_images, train_labels, test_images, test_labels = digits()
    generator = torch.Generator().manual_seed(0)
    steps = epochs * (len(train_labels) // batch_size)
    with tqdm(total=steps, unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(train_labels), generator=generator)
            for batch in order.split(batch_size)[: steps // epochs]:
                for run in runs:
                    run.train_on(train_images[batch], train_labels[batch], dropout_seed=bar.n)
                bar.update()
            bar.set_postfix(loss=f"{runs[0].losses[-1]:.4f}")
    for run in runs:
        run.test_on(test_images, test_labels)


@dataclass
class Results:
    """The two runs, `ours` with FusedSGD and `theirs` with torch.optim.SGD."""

    ours: Run
    theirs: Run

    @property
    def max_loss_difference(self):
        """max |our loss - torch's loss| over all steps."""
        pairs = zip(self.ours.losses, self.theirs.losses, strict=True)
        return max(abs(a - b) for a, b in pairs)


def compare(epochs, optimizer_args):
    """Train with FusedSGD and with torch.optim.SGD's for-loop from the same initial weights."""
    torch.manual_seed(0)
    model = alexnet_for_digits()
    twin = copy.deepcopy(model)
    results = Results(
        ours=Run(model, fm.FusedSGD(model.parameters(), **optimizer_args)),
        theirs=Run(twin, torch.optim.SGD(twin.parameters(), foreach=False, **optimizer_args)),
    )
    train([results.ours, results.theirs], epochs)
    return results


def draw(results, path):
    """Draw both loss curves, and the time of every step."""
    figure, (loss, seconds) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, run, style in (
        ("torch.optim.SGD", results.theirs, {"color": "tab:orange", "linewidth": 3}),
        ("FusedSGD", results.ours, {"color": "tab:blue", "linewidth": 1}),
    ):
        microseconds = [1e6 * s for s in run.step_seconds]
        loss.semilogy(run.losses, label=name, **style)
        label = f"{name}, median {median(microseconds):.0f} µs"
        seconds.semilogy(microseconds, ".", markersize=2, label=label, color=style["color"])
    apart = f"Loss, at most {results.max_loss_difference:.1e} apart"
    loss.set(xlabel="step", ylabel="cross entropy", title=apart)
    seconds.set(xlabel="step", ylabel="optimizer.step(), µs", title="Time of a step")
    for axes in (loss, seconds):
        axes.legend(markerscale=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def key_value(text):
    """Parse one optimizer argument: 'lr=0.1' -> ('lr', 0.1)."""
    key, value = text.split("=", 1)
    return key, ast.literal_eval(value)


def main(argv=None):
    """Train both, print how they compare, draw the figure; return the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--optimizer-args", type=key_value, nargs="*", default=[], metavar="KEY=VALUE",
        help=f"for both optimizers; default {OPTIMIZER_ARGS}",
    )  # fmt: skip
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(argv)

    results = compare(options.epochs, OPTIMIZER_ARGS | dict(options.optimizer_args))
    print(results.ours.optimizer)
    for name, run in (("FusedSGD", results.ours), ("torch.optim.SGD", results.theirs)):
        print(
            f"{name:>15}: last loss {run.losses[-1]:.6f}, test accuracy {run.accuracy:.1%}, "
            f"median step {1e6 * median(run.step_seconds):.0f} µs"
        )
    rounding = torch.finfo(torch.float32).eps * results.ours.losses[0]
    print(
        f"largest difference of a loss: {results.max_loss_difference:.1e} "
        f"(one fp32 rounding of the first loss: {rounding:.1e})"
    )
    draw(results, options.figure)
    print(f"figure: {options.figure}")
    return results


if __name__ == "__main__":
    main()

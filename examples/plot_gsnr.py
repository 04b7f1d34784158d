"""Plot the scales of SGD-SaI for the GPT of train_gpt.py beside the square roots of its sizes.

Each point is a parameter tensor, measured on the gradient of the first batch. Run it from the
repository root; it prints the table too:

    python examples/plot_gsnr.py
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import train_gpt

import fused_momentum as fm

FIGURE = Path(__file__).parent / "figures" / "gsnr.png"


def measure(size):
    """The scales of a fresh model, by the name of the parameter."""
    torch.manual_seed(0)
    model = train_gpt.GPT(size)
    train_gpt.loss_of(model, train_gpt.Text(size, "cpu").batch("train", 0)).backward()
    return fm.gsnr(model)


def draw(scales, path):
    """Draw the scales over the square roots, and how far each is from its own."""
    figure, (both, ratio) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    roots = [math.sqrt(scale.numel) for scale in scales.values()]
    ends = [min(roots) / 1.3, max(roots) * 1.3]
    both.plot(ends, ends, color="0.6", linewidth=1, label=r"$\sqrt{n}$")
    both.loglog(roots, [scale.gsnr for scale in scales.values()], "o", markersize=5, alpha=0.5)
    both.set(xlabel=r"$\sqrt{n}$, n elements", ylabel="scale", title="The scale of a tensor")
    both.legend()
    ordered = sorted(scales.items(), key=lambda item: item[1].ratio)
    ratio.axvline(1, color="0.6", linewidth=1)
    ratio.plot([scale.ratio for _, scale in ordered], range(len(ordered)), "o", markersize=4)
    ratio.set(xlabel=r"scale / $\sqrt{n}$", yticks=[], title="What the gradient adds to it")
    name, scale = ordered[-1]
    left = {"xytext": (-6, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
    ratio.annotate(name, (scale.ratio, len(ordered) - 1), **left)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    """Measure, print and draw the scales; return them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=train_gpt.SIZES, default="small")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(argv)
    scales = measure(train_gpt.SIZES[options.size])
    print(scales)
    draw(scales, options.figure)
    print(f"figure: {options.figure}")
    return scales


if __name__ == "__main__":
    main()

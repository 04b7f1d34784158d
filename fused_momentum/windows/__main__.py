"""A figure of all windows: python -m fused_momentum.windows plot --out windows.png"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import SHAPES, Window

PANELS = (
    {"half": {}, "full": {"half": False}, "flat 0.25, minimum 0.2": {"flat": 0.25, "minimum": 0.2}},
    {"uniform": {}, "kronecker": {"order": "kronecker"}, "4 stairs": {"stairs": 4}},
    {"steps": {}, "epochs": {"unit": "epochs"}, "one_epoch": {"unit": "one_epoch"}},
)
POWERS = {"exponential": 0.01, "logistic_mid": 8, "logistic_late": 8}
# Grey print: the lines of a panel differ in lightness, width and dashes.
STYLES = (
    {"color": "0.6", "linestyle": "-", "linewidth": 3},
    {"color": "black", "linestyle": "--", "linewidth": 1.2},
    {"color": "0.3", "linestyle": ":", "linewidth": 2},
)


def draw(path: str | Path, epochs: int = 6, steps_per_epoch: int = 12) -> Path:
    """Write a figure of every shape in every form, over two windows of steps, into ``path``."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(f"a figure needs matplotlib: pip install matplotlib ({error})") from error
    figure = Figure(figsize=(12, 14), layout="constrained")
    axes = figure.subplots(len(SHAPES) - 1, len(PANELS), sharex=True, sharey=True)
    steps = range(1, 2 * epochs * steps_per_epoch + 1)
    for row, shape in zip(axes, SHAPES[1:], strict=True):
        power = POWERS.get(shape, 2)
        for axis, panel in zip(row, PANELS, strict=True):
            for (label, fields), style in zip(panel.items(), STYLES, strict=True):
                common = {"epochs": epochs, "steps_per_epoch": steps_per_epoch, "power": power}
                window = Window(shape, **common, **fields)
                axis.plot(steps, [window(t) for t in steps], label=label, **style)
            axis.set_title(f"{shape}, power {power}", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[0]:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.15), ncols=3, fontsize=9)
    figure.supxlabel(f"step t; a window of {epochs} epochs of {steps_per_epoch} steps, then again")
    figure.supylabel("factor of the learning rate")
    figure.savefig(path, dpi=110)
    return Path(path)


def main(arguments: list[str] | None = None) -> None:
    """Command line: ``plot`` draws all windows into a file."""
    parser = argparse.ArgumentParser(prog="python -m fused_momentum.windows")
    commands = parser.add_subparsers(dest="command", required=True)
    plot = commands.add_parser("plot", help="draw all windows")
    plot.add_argument("--out", type=Path, default=Path("windows.png"), metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        print(draw(options.out))
    except (OSError, ValueError) as error:
        parser.error(f"--out {options.out}: {error}")


if __name__ == "__main__":
    main()

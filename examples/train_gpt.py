"""Train a small character-level GPT with FusedSGDSaI, FusedSGD and torch's AdamW.

The text is the language reference that ships with Python (``pydoc_data.topics``, what ``help()``
shows). All three start from the same weights and see the same batches. Run it from the repository
root; the larger sizes have the parameters of GPT-2, GPT-2 XL and Llama-2-7B, and want a GPU:

    python examples/train_gpt.py
    python examples/train_gpt.py --size gpt2 --steps 100
"""

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

import fused_momentum as fm

FIGURE = Path(__file__).parent / "figures" / "train_gpt.png"
CPU_OR_GPU = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Size:
    """Shape of a model, of its batches, and how many steps show something."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    steps: int
    vocabulary: int = 128  # at least as many as the text has characters


SIZES = {
    "small": Size(layers=4, heads=4, width=96, context=64, batch=16, steps=1000),
    "gpt2": Size(12, 12, 768, 1024, batch=8, steps=200, vocabulary=50257),
    "gpt2-xl": Size(48, 25, 1600, 1024, batch=4, steps=50, vocabulary=50257),
    "llama-7b": Size(32, 32, 4096, 1024, batch=1, steps=20, vocabulary=32000),
}
# Name -> how to make it. Each learning rate is the best of 1, 2 and 5 times powers of ten for the
# small model.
OPTIMIZERS = {
    "FusedSGDSaI": lambda params: fm.FusedSGDSaI(params, lr=2e-2),
    "FusedSGD": lambda params: fm.FusedSGD(params, lr=0.2, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=5e-3, fused=True),
}
COLOURS = {"FusedSGDSaI": "tab:blue", "FusedSGD": "tab:green", "AdamW": "tab:orange"}


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a norm and beside a shortcut."""

    def __init__(self, size):
        super().__init__()
        self.heads = size.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x):
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Characters [batch, time] -> logits of the next one [batch, time, vocabulary]."""

    def __init__(self, size):
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                shrink = (
                    math.sqrt(2 * size.layers)
                    if name.endswith(("out.weight", "down.weight"))
                    else 1
                )
                nn.init.normal_(p, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, characters):
        x = self.tokens(characters) + self.places.weight[: characters.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.tokens.weight.T


class Text:
    """Python's language reference as numbers; the last tenth is for validation."""

    def __init__(self, size, device):
        text = "\n\n".join(topics.values())
        numbers = {character: i for i, character in enumerate(sorted(set(text)))}
        if len(numbers) > size.vocabulary:
            raise ValueError(f"the text has {len(numbers)} characters, the model {size.vocabulary}")
        encoded = torch.tensor([numbers[character] for character in text], device=device)
        self._size, split = size, len(encoded) * 9 // 10
        self._parts = {"train": encoded[:split], "validation": encoded[split:]}

    def batch(self, part, step):
        """Inputs and targets [batch, context] of a step, the same whenever it is asked for."""
        characters, context = self._parts[part], self._size.context
        maker = torch.Generator().manual_seed(step)
        starts = torch.randint(len(characters) - context, (self._size.batch, 1), generator=maker)
        places = (starts + torch.arange(context + 1)).to(characters.device)
        windows = characters[places]
        return windows[:, :-1], windows[:, 1:]


@dataclass
class Run:
    """What training with one optimizer has recorded."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    validation: float = math.nan
    state_bytes: int = 0
    parameters: int = 0

    @property
    def step_ms(self):
        """Median time of optimizer.step() in ms, the first left out."""
        return 1e3 * median(self.step_seconds[1:] or self.step_seconds)


def loss_of(model, batch):
    inputs, targets = batch
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
        logits = model(inputs)
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def schedule(optimizer, steps):
    """Linear warm-up over a twentieth of the steps, then half a cosine down to a tenth."""
    warm = max(steps // 20, 1)

    def factor(step):
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def train(name, size, text, steps, device, bar):
    """Train a fresh model with the optimizer of that name."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(size)
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler, run = schedule(optimizer, steps), Run()
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, text.batch("train", step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        synchronize(device)
        start = time.perf_counter()
        optimizer.step()
        synchronize(device)
        run.step_seconds.append(time.perf_counter() - start)
        scheduler.step()
        run.losses.append(loss.item())
        bar.update()
        bar.set_postfix(optimizer=name, loss=f"{run.losses[-1]:.3f}")
    with torch.no_grad():
        batches = [text.batch("validation", step) for step in range(20)]
        run.validation = sum(loss_of(model, batch).item() for batch in batches) / len(batches)
    states = [t for state in optimizer.state.values() for t in state.values()]
    run.state_bytes = sum(t.nbytes for t in states if isinstance(t, torch.Tensor))
    run.parameters = sum(p.numel() for p in model.parameters())
    return run


def smooth(losses, span=10):
    """Running means, so that curves of single batches can be told apart."""
    sums = torch.tensor([0.0, *losses]).double().cumsum(0)
    ends = range(1, len(losses) + 1)
    return [((sums[end] - sums[max(end - span, 0)]) / min(end, span)).item() for end in ends]


def draw(runs, size_name, path):
    """Draw the loss curves, the state memory and the step time of all runs."""
    figure, (loss, memory, seconds) = plt.subplots(
        1, 3, figsize=(13, 4), layout="constrained", width_ratios=[2, 1, 1]
    )
    for name, run in runs.items():
        label = f"{name}, validation {run.validation:.3f}"
        loss.plot(smooth(run.losses), label=label, color=COLOURS[name])
    loss.set(xlabel="step", ylabel="cross entropy of a character", title="Loss, mean of 10 steps")
    loss.legend()
    colours = [COLOURS[name] for name in runs]
    for axes, title, values, unit in (
        (memory, "Optimizer state", [r.state_bytes / r.parameters for r in runs.values()], "B"),
        (seconds, "optimizer.step()", [r.step_ms for r in runs.values()], "ms"),
    ):
        bars = axes.bar(list(runs), values, color=colours)
        axes.bar_label(bars, fmt=f"%.3g {unit}")
        axes.set(title=title, ylabel=unit if unit == "ms" else "bytes per parameter")
        axes.tick_params(axis="x", labelsize=8)
        axes.margins(y=0.1)
    millions = next(iter(runs.values())).parameters / 1e6
    figure.suptitle(f"Character-level GPT, {size_name}: {millions:.3g} M parameters")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    """Train with each optimizer, print how they compare, draw the figure; return the runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, help="default: what the size has in SIZES")
    parser.add_argument("--device", default=CPU_OR_GPU, choices=["cpu", "cuda"])
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(argv)

    size = SIZES[options.size]
    steps = size.steps if options.steps is None else options.steps
    text, runs = Text(size, options.device), {}
    with tqdm(total=steps * len(OPTIMIZERS), unit="step") as bar:
        for name in OPTIMIZERS:  # one after the other: of the large sizes only one fits
            runs[name] = train(name, size, text, steps, options.device, bar)
    for name, run in runs.items():
        print(
            f"{name:>12}: last loss {smooth(run.losses)[-1]:.3f}, validation {run.validation:.3f}, "
            f"state {run.state_bytes / 2**20:.1f} MiB, median step {run.step_ms:.3f} ms "
            f"(first {1e3 * run.step_seconds[0]:.3f} ms)"
        )
    draw(runs, options.size, options.figure)
    print(f"figure: {options.figure}")
    return runs


if __name__ == "__main__":
    main()

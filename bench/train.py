"""End to end: where the time of a training step goes, with our optimizer and with torch's.

Forward, backward, step and zero_grad are timed apart, so that an optimizer that makes another phase
slower shows it. All loops of a model start alike and see the same batches; their losses are kept.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

import numpy as np
import torch
from torch import nn

import fused_momentum as fm
from bench.models import Gpt, image_batches, resnet, token_batches
from bench.providers import torch_sgd
from bench.timing import clock_of, nothing

HYPER = {"momentum": 0.9, "weight_decay": 1e-4}
LR = 0.01
BATCHES = 4  # few, so that the loss falls: the model learns them by heart
PHASES = ("forward", "backward", "step", "zero_grad")
WARM_UP, LEAST, MOST = 3, 10, 300  # steps; the warm-up ones are not in the times
COMPILE_SECONDS = 20  # a compiled loop of a small model, on a CPU


@dataclass(frozen=True)
class Model:
    """A model, its batches, and the number of parameters."""

    name: str
    make: Callable[[], nn.Module]
    batches: Callable[[torch.device], list[tuple]]


# Smooth, as their losses are compared: one rounding apart, two networks with ReLU differ by whole
# gradients as soon as one of 10^5 units is on the other side of its kink.
SMALL = (
    Model(
        "small CNN",
        partial(resnet, width=8, blocks=(1, 1, 1, 1), classes=10, activation=nn.SiLU),
        partial(image_batches, BATCHES, 16, 32, 10),
    ),
    Model(
        "small GPT",
        partial(Gpt, width=64, layers=4, heads=4, vocabulary=256, context=32),
        partial(token_batches, BATCHES, 4, 32, 256),
    ),
)
REAL = (
    Model("ResNet-50", resnet, partial(image_batches, BATCHES, 64, 224, 1000)),
    Model("GPT-2 124M", Gpt, partial(token_batches, BATCHES, 4, 1024, 50_257)),
)

OPTIMIZERS: dict[str, Callable] = {
    "ours": partial(fm.FusedSGD, **HYPER),
    "ours, flat": partial(fm.FusedSGD, **HYPER, flatten=True),
    "ours, flat with grads": partial(fm.FusedSGD, **HYPER, flatten="grads"),
    "torch for-loop": partial(torch_sgd, **HYPER),
    "torch foreach": partial(torch_sgd, **HYPER, foreach=True),
    "torch fused": partial(torch_sgd, **HYPER, fused=True),
}
SCALED = ("ours", "torch foreach", "torch fused")  # with the GradScaler
COMPILED = ("ours", "torch foreach")


@dataclass
class Loop:
    """A model in training; `times` holds microseconds of each phase of each step."""

    model: Model
    mode: str
    optimizer_name: str
    device: torch.device
    times: list[list[float]] = field(default_factory=list)
    losses: list = field(default_factory=list)

    def __post_init__(self):
        torch.manual_seed(0)
        self.net = self.model.make().to(self.device)
        self.batches = cycle(self.model.batches(self.device))
        scaled = self.mode == "GradScaler"
        options = {"fused": True} if scaled and self.optimizer_name == "ours" else {}
        params = self.net.parameters()
        self.optimizer = OPTIMIZERS[self.optimizer_name](params, lr=LR, **options)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.cast = (
            partial(torch.autocast, self.device.type, torch.float16) if scaled else nullcontext
        )
        compiled = self.mode == "torch.compile"
        self.compute = torch.compile(self.losses_of) if compiled else self.losses_of
        self.take_step = torch.compile(self.optimizer.step) if compiled else self.optimizer.step

    def losses_of(self, inputs, targets):
        """The loss of one batch."""
        with self.cast():
            return nn.functional.cross_entropy(self.net(inputs), targets)

    def forward(self) -> None:
        """The loss of the next batch."""
        self.loss = self.compute(*self.batch)

    def backward(self) -> None:
        """Its gradients."""
        self.scaler.scale(self.loss).backward()

    def step(self) -> None:
        """The optimizer's step, and the scaler's."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.take_step()

    def zero_grad(self) -> None:
        """Reset the gradients as the optimizer does by default."""
        self.optimizer.zero_grad()

    def run(self, clock) -> None:
        """One training step, timed phase by phase."""
        self.batch = next(self.batches)
        self.times.append([max(clock.time(getattr(self, phase))) for phase in PHASES])
        self.losses.append(self.loss.detach())

    def row(self, ours: "Loop") -> dict:
        """The CSV row, compared with the loop of ours in the same rounds."""
        times = np.asarray(self.times[WARM_UP:])
        whole, other = times.sum(1), np.asarray(ours.times[WARM_UP:]).sum(1)
        return self.heading("ok") | {
            "params": sum(p.numel() for p in self.net.parameters()),
            "tensors": len(list(self.net.parameters())),
            **{f"{p}_us": float(np.median(times[:, i])) for i, p in enumerate(PHASES)},
            "total_us": float(np.median(whole)),
            "step_share": float(np.median(times[:, 2] / whole)),
            "over_ours": float(np.median(whole / other)),
            "steps": len(self.times),
            "last_loss": float(self.losses[-1]),
        }

    def heading(self, status: str) -> dict:
        """The first columns of a row."""
        return heading(self.model.name, self.mode, self.optimizer_name, status)

    def curve(self) -> list[dict]:
        """The loss at each step."""
        losses = torch.stack(self.losses).float().tolist()
        head = self.heading("ok")
        return [head | {"step": i, "loss": loss} for i, loss in enumerate(losses)]


def heading(model: str, mode: str, optimizer: str, status: str) -> dict:
    """The first columns of a row."""
    return {"model": model, "mode": mode, "optimizer": optimizer, "status": status}


def race(loops: list[Loop], deadline: float, tick) -> None:
    """A step of each loop in turn, the first one another each round, until `deadline`."""
    clock = clock_of(loops[0].device)
    steps = 0
    while steps < LEAST + WARM_UP or (steps < MOST and time.monotonic() < deadline):
        first = steps % len(loops)
        for loop in loops[first:] + loops[:first]:
            loop.run(clock)
        steps += 1
        tick()


def plans(device: torch.device, compile_seconds: float) -> list[tuple]:
    """(model, mode, optimizers, why not) of everything that is run."""
    found = []
    for model in REAL if device.type == "cuda" else SMALL:
        need = COMPILE_SECONDS * len(COMPILED)
        compiled = ""
        if need > compile_seconds:
            compiled = f"skipped: compiling takes about {need} s, of {compile_seconds:.0f} s"
        found += [
            (model, "eager", tuple(OPTIMIZERS), ""),
            (model, "GradScaler", SCALED, ""),
            (model, "torch.compile", COMPILED, compiled),
        ]
    return found


def run(device: torch.device, seconds: float, tick=nothing) -> tuple[list[dict], list[dict]]:
    """Rows of train.csv and of curves.csv."""
    rows, curves = [], []
    todo = plans(device, seconds / 2)
    end = time.monotonic() + seconds
    for i, (model, mode, names, reason) in enumerate(todo):
        if reason:
            rows += [heading(model.name, mode, name, reason) for name in names]
            continue
        loops = [Loop(model, mode, name, device) for name in names]
        left = sum(not later for *_, later in todo[i:])
        race(loops, time.monotonic() + (end - time.monotonic()) / left, tick)
        rows += [loop.row(loops[0]) for loop in loops]
        if mode == "eager":
            curves += [row for loop in loops for row in loop.curve()]
        torch._dynamo.reset()
    return rows, curves

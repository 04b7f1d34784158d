"""Update a network layer by layer: from backward hooks, and over slices of flat buffers.

Neither way copies a parameter, and both give exactly what one ordinary `optimizer.step()` gives.
Run it from the repository root:

    python examples/backward_hook.py
"""

import copy
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn

import fused_momentum as fm

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


def network():
    """A small classifier: [n, 20] -> logits [n, 5]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)
    )


def batches(steps):
    """The same random batches at every call: inputs [32, 20], labels [32]."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield (
            torch.randn(32, 20, generator=generator),
            torch.randint(5, (32,), generator=generator),
        )


def backward(model, inputs, labels):
    """Forward and backward of the cross entropy."""
    nn.functional.cross_entropy(model(inputs), labels).backward()


def pointers(model):
    """Where each parameter lives in memory."""
    return [parameter.data_ptr() for parameter in model.parameters()]


def train_ordinarily(model, steps):
    """The yardstick: all gradients first, then one step over all layers."""
    optimizer = fm.FusedSGD(model.parameters(), **SETTINGS)
    for inputs, labels in batches(steps):
        optimizer.zero_grad()
        backward(model, inputs, labels)
        optimizer.step()


def train_in_backward(model, steps):
    """Update each parameter inside backward, as soon as its gradient exists.

    Returns the largest number of gradients alive at once: an updated layer needs its own no more.
    """
    optimizer = fm.FusedSGD(model.parameters(), **SETTINGS)
    alive = []

    def update(parameter):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        optimizer.step_params([parameter])
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    for inputs, labels in batches(steps):
        backward(model, inputs, labels)
    return max(alive)


def train_over_slices(model, steps):
    """Keep parameters, gradients and velocities flat, and update each layer by start and end.

    Returns where the parameters lived before the first step.
    """
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    weights, gradients, velocities = fm.initialize_velocities([(sum(sizes),)] * 3)

    start = 0
    for parameter in model.parameters():
        here = slice(start, start + parameter.numel())
        weights[here] = parameter.detach().flatten()
        parameter.data = weights[here].view_as(parameter)
        parameter.grad = gradients[here].view_as(parameter)
        start = here.stop

    before = pointers(model)
    for inputs, labels in batches(steps):
        gradients.zero_()
        backward(model, inputs, labels)
        for start, end in pairwise(accumulate(sizes, initial=0)):
            layer = slice(start, end)
            fm.ops.sgd_([weights[layer]], [gradients[layer]], [velocities[layer]], **SETTINGS)
    return before


@dataclass
class Results:
    """For each way of training: did it equal the ordinary step, did the pointers stay?"""

    equal: dict[str, bool]
    pointers_kept: dict[str, bool]
    gradients_alive: int


def same_parameters(a, b):
    """Whether two models have bit-equal parameters."""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def main(steps=20):
    """Train the same network in the three ways and compare."""
    ordinary = network()
    hooked, sliced = copy.deepcopy(ordinary), copy.deepcopy(ordinary)
    train_ordinarily(ordinary, steps)

    hooked_before = pointers(hooked)
    alive = train_in_backward(hooked, steps)
    sliced_before = train_over_slices(sliced, steps)

    results = Results(
        equal={
            "backward hook": same_parameters(hooked, ordinary),
            "flat slices": same_parameters(sliced, ordinary),
        },
        pointers_kept={
            "backward hook": hooked_before == pointers(hooked),
            "flat slices": sliced_before == pointers(sliced),
        },
        gradients_alive=alive,
    )
    for way, equal in results.equal.items():
        kept = results.pointers_kept[way]
        print(f"{way}: equal to the ordinary step: {equal}, data pointers unchanged: {kept}")
    print(f"backward hook: at most {alive} of {len(hooked_before)} gradients alive at once")
    return results


if __name__ == "__main__":
    main()

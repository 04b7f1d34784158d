"""SGD-SaI told once more, as a test: in float64, with a tensor's whole history and no stages."""

import ctypes
import math

import torch

SCALES = ("gsnr", "gsnr_max", "sqrt_numel")
DEGENERATE = ("bound", "official", "defer")


def formula(grad, eps):
    """|g| / (std(g) + eps), where the deviation of one element is 0."""
    grad = grad.double()
    deviation = grad.std().nan_to_num(0.0).item() if grad.numel() > 1 else 0.0
    norm = grad.norm().item()
    return norm / (deviation + eps) if deviation + eps else math.nan


def usable(grad):
    """Whether the gradient is finite, not zero and not constant."""
    return bool(grad.isfinite().all() and grad.numel() and (grad != grad.flatten()[0]).any())


class Tensor:
    """One parameter: its value, its buffer, and the gradients that have counted so far."""

    def __init__(self, value, scale, degenerate):
        self.p, self.m = value.detach().clone().double(), torch.zeros(()).double()
        self.scale, self.degenerate, self.seen = scale, degenerate, []

    def see(self, grad, eps):
        """A step's gradient; ``gsnr`` is then the scale that the step uses."""
        self.grad, self.eps = grad.double(), eps
        counts = self.degenerate == "official" or bool((grad != 0).any())
        self.begins = counts and not self.seen
        if counts:
            self.seen.append(self.grad)

    @property
    def gsnr(self):
        if not self.seen:
            return 0.0
        first, n = self.seen[0], self.p.numel()
        if self.degenerate == "defer":
            first = next(filter(usable, self.seen), first)
        if self.scale == "sqrt_numel":
            return _float32(math.sqrt(n))
        if self.degenerate == "official" or usable(first):
            return _float32(formula(first, self.eps))
        return _float32(math.sqrt(max(n - 1, 1)))

    def step(self, lr, momentum, weight_decay, largest):
        """The step; ``largest`` is the largest scale of the model."""
        if self.begins:
            self.m = self.grad
        elif self.seen:
            self.m = momentum * self.m + (1 - momentum) * self.grad
        scale = self.gsnr / largest if self.scale == "gsnr_max" else self.gsnr
        self.p = (1 - lr * weight_decay) * self.p - lr * scale * self.m


def _float32(x):
    return ctypes.c_float(x).value


def step(tensors, grads, *, lr, momentum, weight_decay, eps):
    """One step of all tensors, those without a gradient (None) left alone."""
    pairs = [(t, g) for t, g in zip(tensors, grads, strict=True) if g is not None]
    for tensor, grad in pairs:
        tensor.see(grad, eps)
    largest = max((t.gsnr for t in tensors), default=0.0) or 1.0
    for tensor, _ in pairs:
        tensor.step(lr, momentum, weight_decay, largest)

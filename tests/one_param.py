"""A parameter of ones and its optimizer, on the two walks: the extension's and the reference's."""

import pytest
import torch
from cases import EXTENSION
from torch.nn import Parameter

from fused_momentum import FusedSGD

needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the extension's walk alone")
walks = pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=needs_extension), "reference"]
)


def stepped(backend, shape=(8,), steps=1, cls=FusedSGD, **kwargs):
    """The two, after some steps on gradients of ones."""
    p = Parameter(torch.ones(shape))
    given = {"momentum": 0.9} if cls is FusedSGD else {}
    optimizer = cls([p], lr=0.1, backend=backend, **given | kwargs)
    p.grad = torch.ones(shape)
    for _ in range(steps):
        optimizer.step()
    return p, optimizer

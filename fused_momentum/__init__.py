"""Momentum-family optimizers for PyTorch whose whole step is one launch."""

from . import ops
from ._version import __version__
from .backends import backends
from .flat import initialize_velocities, initialize_velocities_from_params
from .optimizers import (
    FusedAutoSGM,
    FusedMomentum,
    FusedNAG,
    FusedSGD,
    FusedSGDSaI,
    LearningRate,
    Smoothing,
    WeightDecay,
)
from .scales import gsnr
from .windows import Window

__all__ = [
    "FusedAutoSGM",
    "FusedMomentum",
    "FusedNAG",
    "FusedSGD",
    "FusedSGDSaI",
    "LearningRate",
    "Smoothing",
    "WeightDecay",
    "Window",
    "__version__",
    "backends",
    "gsnr",
    "initialize_velocities",
    "initialize_velocities_from_params",
    "ops",
]

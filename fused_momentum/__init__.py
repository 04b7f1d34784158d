"""Momentum-family optimizers for PyTorch whose whole step is one launch."""

from . import ops
from ._version import __version__
from .backends import backends
from .flat import initialize_velocities, initialize_velocities_from_params
from .optimizers import FusedMomentum, FusedNAG, FusedSGD

__all__ = [
    "FusedMomentum",
    "FusedNAG",
    "FusedSGD",
    "__version__",
    "backends",
    "initialize_velocities",
    "initialize_velocities_from_params",
    "ops",
]

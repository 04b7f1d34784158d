"""Momentum-family optimizers for PyTorch whose whole step is one launch."""

from . import ops
from ._version import __version__
from .backends import backends
from .flat import initialize_velocities, initialize_velocities_from_params
from .optimizers import FusedMomentum, FusedNAG, FusedSGD, FusedSGDSaI
from .scales import gsnr

__all__ = [
    "FusedMomentum",
    "FusedNAG",
    "FusedSGD",
    "FusedSGDSaI",
    "__version__",
    "backends",
    "gsnr",
    "initialize_velocities",
    "initialize_velocities_from_params",
    "ops",
]

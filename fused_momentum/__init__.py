"""Momentum-family optimizers for PyTorch whose whole step is one launch."""

from . import ops, optimizers
from ._version import __version__
from .backends import backends
from .flat import initialize_velocities, initialize_velocities_from_params
from .optimizers import *  # noqa: F403  all of optimizers.__all__
from .scales import gsnr
from .windows import Window

__all__ = [
    *optimizers.__all__,
    "Window",
    "__version__",
    "backends",
    "gsnr",
    "initialize_velocities",
    "initialize_velocities_from_params",
    "ops",
]

"""The optimizer classes: arguments, docstrings, state; the maths is in ``fused_momentum.rules``."""

from .momentum import FusedMomentum
from .nag import FusedNAG
from .sgd import FusedSGD
from .sgd_sai import FusedSGDSaI

__all__ = ["FusedMomentum", "FusedNAG", "FusedSGD", "FusedSGDSaI"]

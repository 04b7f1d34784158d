"""The optimizer classes: arguments, docstrings, state; the maths is in ``fused_momentum.rules``."""

from .autosgm import FusedAutoSGM
from .autosgm_config import LearningRate, Smoothing, WeightDecay
from .momentum import FusedMomentum
from .nag import FusedNAG
from .sgd import FusedSGD
from .sgd_sai import FusedSGDSaI

__all__ = [
    "FusedAutoSGM",
    "FusedMomentum",
    "FusedNAG",
    "FusedSGD",
    "FusedSGDSaI",
    "LearningRate",
    "Smoothing",
    "WeightDecay",
]

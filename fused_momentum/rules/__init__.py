"""The maths of every optimizer: one plain function per rule, and one table row beside it.

A rule is told twice in this project: here, and in ``csrc/rules`` with the same names in the same
order. The functions are executed as they stand by the reference (on torch tensors) and by the
Triton kernels (through ``triton.jit``), so they may use only ``+ - *``, comparisons, ``if`` on a
scalar, and ``functions``. One operation is one rounding: the order of the operations *is* the
definition.

``derive`` turns the hyper-parameters of a group (float64) into the scalars of an update; each
scalar is rounded once to the type that the update computes in. ``update`` is elementwise.
"""

from .autosgm import AUTOSGM
from .momentum import LOOKAHEAD, VELOCITY
from .sgd import SGD
from .sgd_sai import SGD_SAI
from .table import STEP, Kept, Measure, Rule, State

RULES = {rule.name: rule for rule in (SGD, VELOCITY, LOOKAHEAD, SGD_SAI, AUTOSGM)}

__all__ = ["RULES", "STEP", "Kept", "Measure", "Rule", "State"]

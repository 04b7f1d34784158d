"""The rules on Triton: one launch for the tensors of one dtype signature, whatever their number.

launcher = Launcher(rule)
launcher.measure(batches(items), hyper, updates=True)  # in a step that measures
launcher.run(batches(items), hyper)  # or the batches of the extension's plan
"""

from .describe import Batch, Item, batches
from .launch import Launcher
from .table import Table

__all__ = ["Batch", "Item", "Launcher", "Table", "batches"]

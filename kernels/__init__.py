"""The rules on Triton: one launch for the tensors of one dtype signature, whatever their number.

addresses, numels, layouts = describe(tensors)
table = Table(device)
table.set_tensors(addresses, numels, rows, tensor_scalars, layouts)
table.set_hyper(hyper)
run(rule, dtypes, table)
"""

from .describe import describe
from .launch import Table, run
from .sums import tensor_sums

__all__ = ["Table", "describe", "run", "tensor_sums"]

"""Level 2: how to MULTIPLY. Importing this package fills the table of kernels; each kernel declares itself in its own file."""

from quantlib.kernels import cpu, reference, triton
from quantlib.kernels.base import Kernel, Problem, get_kernel, list_kernels, register_kernel, unregister_kernel

__all__ = [
    "Kernel",
    "Problem",
    "cpu",
    "get_kernel",
    "list_kernels",
    "reference",
    "register_kernel",
    "triton",
    "unregister_kernel",
]

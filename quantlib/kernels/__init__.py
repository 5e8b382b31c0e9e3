"""Level 2: how to MULTIPLY. Importing this package fills the table of kernels; each kernel declares itself in its own file."""

from quantlib.kernels import (
    activations,
    cpu,
    cpu_amx,
    cpu_lookup,
    cpu_pairs,
    cpu_quantize,
    cuda_fragments,
    cuda_scaled,
    cuda_sm90,
    cuda_sm90_fp8,
    grouped,
    reference,
    torch_scaled,
    triton,
    triton_fragments,
)
from quantlib.kernels.base import Kernel, Problem, get_kernel, list_kernels, register_kernel, unregister_kernel

__all__ = [
    "Kernel",
    "Problem",
    "activations",
    "cpu",
    "cpu_amx",
    "cpu_lookup",
    "cpu_pairs",
    "cpu_quantize",
    "cuda_fragments",
    "cuda_scaled",
    "cuda_sm90",
    "cuda_sm90_fp8",
    "get_kernel",
    "grouped",
    "list_kernels",
    "reference",
    "register_kernel",
    "torch_scaled",
    "triton",
    "triton_fragments",
    "unregister_kernel",
]

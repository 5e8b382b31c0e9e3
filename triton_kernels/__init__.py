"""Triton kernels. This package knows only triton."""

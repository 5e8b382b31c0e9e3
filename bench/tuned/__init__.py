"""Tuned data per device: what was measured on it, as JSON beside this file (read by quantlib.kernels.costs)."""

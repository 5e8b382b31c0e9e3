"""The inverse of a damped Hessian, as its Cholesky factor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.errors import QuantlibError

ATTEMPTS = 20


def padded(hessian: Tensor, columns: int) -> Tensor:
    """[K, K] -> [columns, columns]: further columns are such as no input reaches."""
    more = columns - len(hessian)
    return functional.pad(hessian, (0, more, 0, more))


def damped(hessian: Tensor, percent: float) -> Tensor:
    """hessian + percent * mean diagonal * identity; a column that no input ever reached gets the mean diagonal itself."""
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else torch.ones((), dtype=hessian.dtype, device=hessian.device)
    result = hessian.clone()
    result.diagonal().copy_(torch.where(live, diagonal, mean) + percent * mean)
    return result


def inverse_factor(hessian: Tensor, percent: float, name: str) -> Tensor:
    """Upper triangular U [K, K] with U^T U = inverse of the damped Hessian.

    Damping grows by `percent` after each failure. Raises QuantlibError after ATTEMPTS of them.
    """
    step = percent if percent > 0 else 0.01
    for attempt in range(ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, percent + attempt * step))
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and bool(torch.isfinite(upper).all()):
            found: Tensor = upper
            return found
    raise QuantlibError(
        f"{name}: the Hessian of its inputs has no Cholesky factor even with {percent + (ATTEMPTS - 1) * step:.0%} damping; "
        "calibrate with more text, or raise damp_percent"
    )

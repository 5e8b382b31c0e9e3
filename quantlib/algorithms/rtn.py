"""Round to nearest: scales from the weight alone (or with the inputs' importance), every weight to its nearest code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantlib.algorithms.base import register_algorithm, validate_weight
from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.formats.search import Search
from quantlib.tensor import QuantizedTensor


@dataclass(frozen=True)
class RTN:
    """search: "absmax" (the format's own rule) or "mse" (least squared error, weighted by importance where it is given).

    A lower weight error is not always a lower perplexity: an unweighted search can lose. See docs/quality.md.
    """

    search: Search = "absmax"

    @property
    def name(self) -> str:
        return "rtn" if self.search == "absmax" else f"rtn-{self.search}"

    def quantize(self, weight: Tensor, fmt: Format, importance: Tensor | None = None, name: str = "weight") -> QuantizedTensor:
        """weight [N, K] -> rows layout. importance: [K] or [N, K] weights of the squared error. Raises as `validate_weight`."""
        validate_weight(weight, fmt, name)
        weight = weight.detach()
        scales = fmt.fit(weight, importance=importance, search=self.search)
        parts = {"codes": fmt.encode(weight, scales), **scales}
        n, k = weight.shape
        return QuantizedTensor(fmt, (n, k), {part: parts[part] for part in fmt.specs(n, k)})


register_algorithm("rtn", RTN)
register_algorithm("rtn-mse", lambda: RTN("mse"))


def quantize(
    weight: Tensor,
    spec: str | Format,
    *,
    search: Search = "absmax",
    importance: Tensor | None = None,
    name: str = "weight",
    **keywords: Any,
) -> QuantizedTensor:
    """Quantize one weight by rounding to nearest.

    weight      [N, K], any float dtype and device
    spec        a spec string ("int4-g64") or a Format; further keywords go to `get_format` (group_size=64, symmetric=False)
    search      "absmax" or "mse"; importance: [K] or [N, K], weights of the squared error in the search
    name        what error messages call the tensor

    Raises FormatError (spec, or a scale out of range) and ShapeError (shape, dtype, NaN or Inf).
    """
    return RTN(search).quantize(weight, get_format(spec, **keywords), importance, name)

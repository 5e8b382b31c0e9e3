"""Round to nearest: scales from the weight alone (or with the inputs' importance), every weight to its nearest code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantlib.algorithms.base import register_algorithm, require_inputs, validate_weight
from quantlib.algorithms.statistics import InputStatistics, Need
from quantlib.errors import QuantlibError
from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.formats.search import Search
from quantlib.tensor import QuantizedTensor


@dataclass(frozen=True)
class RTN:
    """Round to nearest.

    search      "absmax" (the format's own rule) or "mse" (least squared error of each block)
    importance  weigh that error by the mean square of each input, from calibration data

    A lower weight error is not always a lower perplexity: an unweighted search can lose. See docs/quality.md.
    """

    search: Search = "absmax"
    importance: bool = False

    def __post_init__(self) -> None:
        if self.importance and self.search == "absmax":
            raise QuantlibError("RTN(importance=True) weighs a search's error, and search='absmax' has none: use search='mse'")

    @property
    def name(self) -> str:
        if self.importance:
            return "rtn-importance"
        return "rtn" if self.search == "absmax" else f"rtn-{self.search}"

    @property
    def needs(self) -> Need:
        return "moments" if self.importance else "nothing"

    def quantize(
        self, weight: Tensor, fmt: Format, inputs: InputStatistics | None = None, name: str = "weight"
    ) -> QuantizedTensor:
        """weight [N, K] -> rows layout. Raises as `validate_weight`; QuantlibError where importance lacks its data."""
        weights = require_inputs(inputs, weight, name, self.name).mean_square if self.importance else None
        return _rounded(weight, fmt, self.search, weights, name)


def _rounded(weight: Tensor, fmt: Format, search: Search, importance: Tensor | None, name: str) -> QuantizedTensor:
    validate_weight(weight, fmt, name)
    weight = weight.detach()
    scales = fmt.fit(weight, importance=importance, search=search)
    parts = {"codes": fmt.encode(weight, scales), **scales}
    n, k = weight.shape
    return QuantizedTensor(fmt, (n, k), {part: parts[part] for part in fmt.specs(n, k)})


register_algorithm("rtn", RTN)
register_algorithm("rtn-mse", lambda: RTN("mse"))
register_algorithm("rtn-importance", lambda: RTN("mse", importance=True))


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
    return _rounded(weight, get_format(spec, **keywords), search, importance, name)

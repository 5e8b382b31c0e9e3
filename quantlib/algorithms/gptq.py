"""GPTQ (arXiv 2210.17323) for every format: columns are rounded one after another, and each error is made up for by the columns
that are still to come, as far as the inputs' second moments allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.algorithms.base import register_algorithm, require_inputs, validate_weight
from quantlib.algorithms.columns import Grid, storable
from quantlib.algorithms.descent import descend
from quantlib.algorithms.hessian import damped, inverse_factor, padded
from quantlib.algorithms.statistics import InputStatistics, Need
from quantlib.formats.base import Format
from quantlib.formats.search import Search
from quantlib.tensor import QuantizedTensor


@dataclass(frozen=True)
class GPTQ:
    """Options, under their usual names.

    damp_percent   share of the mean diagonal that is added to the Hessian's diagonal; grows until it can be factored
    desc_act       columns in descending order of their inputs' mean square. Scales stay where they are, so no index of groups
                   is needed: groups are visited by their largest column and columns inside a group in order, or, with
                   static_groups, columns in any order
    static_groups  fit every group's scales before the first column, on the weight as it was; else each on the updated weight
    search         how scales are fitted: "mse", weighted by the inputs' mean square, or "absmax"
    block_size     columns whose errors are spread over the rest together; a matter of speed alone
    sweeps         passes of coordinate descent over codes and scales afterwards; none raises the error on the calibration data
    """

    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    search: Search = "mse"
    block_size: int = 128
    sweeps: int = 0

    needs: ClassVar[Need] = "hessian"

    @property
    def name(self) -> str:
        return "gptq"

    def quantize(
        self,
        weight: Tensor,
        fmt: Format,
        inputs: InputStatistics | None = None,
        name: str = "weight",
    ) -> QuantizedTensor:
        """weight [N, K] -> rows layout, by the statistics of its inputs. Raises QuantlibError where they are missing or their
        Hessian can't be factored, ShapeError and FormatError as `validate_weight`."""
        validate_weight(weight, fmt, name)
        inputs = require_inputs(inputs, weight, name, self.name)
        weight = weight.detach()
        work = torch.float64 if weight.device.type == "cpu" else torch.float32
        hessian = inputs.hessian.to(device=weight.device, dtype=work)
        # A zero on the diagonal is a column that no input reaches; padding is such a column.
        hessian = damped(padded(hessian, fmt.padded(weight.shape[1])), 0.0)
        columns = functional.pad(weight.to(work), (0, len(hessian) - weight.shape[1])).T.contiguous()

        plain = storable(fmt)
        grid = Grid.empty(plain, weight)
        codes = self._solve(columns, grid, hessian, name, fitted=False)
        if plain is fmt:
            return grid.result(codes)
        # Scales that are quantized together: the first pass gave numbers, the second takes what storing leaves of them.
        stored = fmt.store(grid.numbers, grid.shared)
        grid = Grid(fmt, grid.n, grid.k, grid.shared, fmt.effective(stored))
        return grid.result(self._solve(columns, grid, hessian, name, fitted=True), stored)

    def _solve(self, weight: Tensor, grid: Grid, hessian: Tensor, name: str, fitted: bool) -> Tensor:
        """Codes uint8 [columns, n] for a transposed weight [columns, n]; fits `grid`'s scales where they are not yet."""
        importance = hessian.diagonal().to(torch.float32)
        if self.static_groups and not fitted:
            for start in range(0, len(weight), grid.group):
                self._fit(grid, weight[start : start + grid.group], start, importance)
        fresh = not fitted and not self.static_groups
        order = self._order(hessian.diagonal(), grid.group if fresh else 1)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        factor = inverse_factor(hessian[order][:, order], self.damp_percent, name)
        left = weight[order]  # what is to be rounded, with the errors made so far spread over it
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        values = torch.empty_like(weight)
        block = -(-self.block_size // grid.group) * grid.group if fresh and grid.group < len(weight) else self.block_size
        columns = order.tolist()
        for start in range(0, len(columns), block):
            stop = min(start + block, len(columns))
            errors = torch.empty_like(left[start:stop])
            for i in range(start, stop):
                column = columns[i]
                if fresh and i % grid.group == 0:
                    first = column // grid.group * grid.group
                    self._fit(grid, left[place[first : first + grid.group]], first, importance)
                codes[column], values[column] = grid.round(left[i], grid.at(column))
                errors[i - start] = (left[i] - values[column]) / factor[i, i]
                left[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
            left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        if self.sweeps:
            descend(weight, grid, damped(hessian, self.damp_percent), codes, values, self.sweeps, scales=not fitted)
        return codes

    def _fit(self, grid: Grid, columns: Tensor, start: int, importance: Tensor) -> None:
        weights = importance[start : start + grid.group] if self.search == "mse" else None
        grid.fit(start, columns.T.to(torch.float32, memory_format=torch.contiguous_format), weights, self.search)

    def _order(self, diagonal: Tensor, group: int) -> Tensor:
        """The order in which columns are rounded; whole groups of `group` columns stay together."""
        if not self.desc_act:
            return torch.arange(len(diagonal), device=diagonal.device)
        groups = diagonal.view(-1, group)
        inside = groups.argsort(dim=1, descending=True, stable=True)
        of_groups = groups.amax(dim=1).argsort(descending=True, stable=True)
        first = torch.arange(0, len(diagonal), group, device=diagonal.device)
        return (first[:, None] + inside)[of_groups].reshape(-1)


register_algorithm("gptq", GPTQ)

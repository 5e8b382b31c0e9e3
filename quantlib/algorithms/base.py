"""What an algorithm is, how one is named, and what a weight must be before any of them starts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quantlib.algorithms.statistics import InputStatistics, Need
from quantlib.errors import QuantlibError, ShapeError
from quantlib.formats.base import Format, extremes
from quantlib.tensor import QuantizedTensor


@runtime_checkable
class Algorithm(Protocol):
    """Chooses scales and codes for one weight. `needs`: what it must know of the layer's inputs."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Need: ...

    def quantize(
        self, weight: Tensor, fmt: Format, inputs: InputStatistics | None = None, name: str = "weight"
    ) -> QuantizedTensor:
        """weight [N, K], any float dtype -> its packed form in the rows layout.

        Raises QuantlibError where `inputs` lack what the algorithm needs.
        """
        ...


@runtime_checkable
class Scaling(Protocol):
    """What an algorithm offers besides, that wants inputs of layers divided by factors before their weights are quantized."""

    def scales(
        self, weights: Sequence[Tensor], formats: Sequence[Format], inputs: InputStatistics, sources: Tensor | None = None
    ) -> Tensor | None:
        """Factors fp32 [P] for layers with weights [N, K] that read one input; None to leave them as they are.

        sources: int64 [K], which of the P numbers that the module before makes each input is a copy of; None: P = K, in order.
        """
        ...


_ALGORITHMS: dict[str, Callable[[], Algorithm]] = {}


def register_algorithm(name: str, build: Callable[[], Algorithm]) -> None:
    """Make `algorithm="name"` known; `build` makes it with default options."""
    if name in _ALGORITHMS:
        raise QuantlibError(f"algorithm {name!r} is registered already")
    _ALGORITHMS[name] = build


def list_algorithms() -> list[str]:
    """Every registered name."""
    return list(_ALGORITHMS)


def get_algorithm(algorithm: str | Algorithm) -> Algorithm:
    """An algorithm by name or as it is. Raises QuantlibError naming the known ones."""
    if not isinstance(algorithm, str):
        return algorithm
    if algorithm not in _ALGORITHMS:
        nearest = difflib.get_close_matches(algorithm, _ALGORITHMS, n=1, cutoff=0.0)[0]
        raise QuantlibError(f"unknown algorithm {algorithm!r}; did you mean {nearest!r}? Known: {', '.join(list_algorithms())}")
    return _ALGORITHMS[algorithm]()


def validate_weight(weight: Tensor, fmt: Format, name: str = "weight") -> None:
    """Raise ShapeError or FormatError unless `weight` is a finite float matrix that `fmt` can hold. Copies nothing."""
    if weight.dim() != 2:
        raise ShapeError(f"{name}: a weight has two dimensions [out_features, in_features], found {list(weight.shape)}")
    if not weight.is_floating_point():
        raise ShapeError(f"{name}: a weight is quantized from a float dtype, found {weight.dtype}")
    if weight.is_meta:
        raise ShapeError(f"{name}: the weight is on the meta device and holds no data; load it before quantizing")
    if weight.numel() == 0:
        return
    low, high = (float(extreme) for extreme in extremes(weight.detach()))
    if not (low == low and abs(low) != float("inf") and abs(high) != float("inf")):
        bad = int((~torch.isfinite(weight)).sum())
        raise ShapeError(
            f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; quantization needs finite weights: "
            "repair the checkpoint or leave this layer out with skip="
        )
    try:
        fmt.scale.fit_shared(torch.tensor(max(-low, high), dtype=torch.float32), fmt.codec.divisor)
    except QuantlibError as error:
        raise type(error)(f"{name}: {error}") from None


def require_inputs(inputs: InputStatistics | None, weight: Tensor, name: str, algorithm: str) -> InputStatistics:
    """The statistics, checked against weight [N, K]. Raises QuantlibError or ShapeError in words."""
    if inputs is None or inputs.tokens == 0:
        raise QuantlibError(f"{name}: {algorithm} needs calibration data, and this layer has seen none; pass calibration=")
    if inputs.columns != weight.shape[1]:
        raise ShapeError(f"{name}: statistics of {inputs.columns} inputs don't fit a weight {list(weight.shape)}")
    return inputs

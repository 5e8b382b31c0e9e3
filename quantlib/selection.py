"""Which layers of a model get which format: skip lists, glob and regular-expression patterns, checked before any work."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from torch import nn

from quantlib.errors import QuantlibError
from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.presets import formats_by_layer

Spec: TypeAlias = str | Format | Mapping[str, str | Format | None]

DEFAULT_SKIP = ("lm_head",)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> layer for every plain nn.Linear (a subclass counts where it keeps nn.Linear's forward), each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and _replaceable(module)}


def stacked_weights(model: nn.Module) -> list[str]:
    """Names of parameters that hold a stack of matrices [E, N, K], as experts often lie; a convolution's weight is none."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and len(parameter) > 1
    ]


def _replaceable(module: nn.Linear) -> bool:
    """Not so for nn.MultiheadAttention's projection, whose weight is read and whose forward is never called."""
    functional_use = type(module).__name__ == "NonDynamicallyQuantizableLinear"
    return type(module).forward is nn.Linear.forward and not functional_use


def matches(pattern: str, name: str) -> bool:
    """A glob over the full dotted name, "re:..." (searched in it), or the plain name of a layer or of a module above it."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def select_formats(layers: Mapping[str, nn.Linear], spec: Spec, skip: Iterable[str] = DEFAULT_SKIP) -> dict[str, Format]:
    """Layer name -> format, for the layers that are to be quantized.

    spec  one format for all; a mix (quantlib.presets) by its name; or {pattern: format}, the first match wins, None leaves a
          layer as it is
    skip  patterns of layers to leave; a layer that `spec` names in full is never skipped

    Raises FormatError for an unknown format, QuantlibError for a pattern or a skip entry that matches no layer.
    """
    names = list(layers)
    if not names:
        raise QuantlibError("the model holds no torch.nn.Linear to quantize")
    skip = tuple(skip)
    for entry in skip:
        if entry not in DEFAULT_SKIP and not any(matches(entry, name) for name in names):
            raise QuantlibError(_nothing("skip entry", entry, names))
    skipped = {name for name in names if any(matches(entry, name) for entry in skip)}
    if not isinstance(spec, Mapping):
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        chosen = {name: fmt for name, fmt in formats_by_layer(spec, shapes).items() if name not in skipped}
    else:
        chosen = _by_pattern(names, spec, skipped)
    if not chosen:
        raise QuantlibError(f"nothing is left to quantize: all {len(names)} linear layers are skipped")
    return chosen


def _by_pattern(names: list[str], spec: Mapping[str, str | Format | None], skipped: set[str]) -> dict[str, Format]:
    formats = {pattern: None if value is None else get_format(value) for pattern, value in spec.items()}
    for pattern in formats:
        _check_regex(pattern)
        if not any(matches(pattern, name) for name in names):
            raise QuantlibError(_nothing("pattern", pattern, names))
    chosen = {}
    for name in names:
        first = next((pattern for pattern in formats if matches(pattern, name)), None)
        if first is None or (name in skipped and first != name):
            continue
        fmt = formats[first]
        if fmt is not None:
            chosen[name] = fmt
    return chosen


def _check_regex(pattern: str) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise QuantlibError(f"pattern {pattern!r} is no regular expression: {error}") from None


def _nothing(kind: str, pattern: str, names: list[str]) -> str:
    near = difflib.get_close_matches(pattern.removeprefix("re:"), names, n=3, cutoff=0.0)
    return f"{kind} {pattern!r} matches none of the {len(names)} linear layers; the nearest names are {', '.join(near)}"

"""Options as other packages write them: GPTQ's quantize_config and AWQ's quant_config become arguments of patch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from quantlib.algorithms import AWQ, GPTQ, Algorithm
from quantlib.errors import QuantlibError
from quantlib.formats import get_format
from quantlib.selection import DEFAULT_SKIP

_SHARED = {"bits", "group_size", "quant_method", "modules_to_not_convert"}
_GPTQ = _SHARED | {"sym", "desc_act", "static_groups", "damp_percent", "true_sequential", "block_size"}
_AWQ = _SHARED | {"w_bit", "q_group_size", "zero_point", "n_grid", "duo_scaling", "apply_clip"}
_ALIASES = {"w_bit": "bits", "q_group_size": "group_size"}
_OF_FILES = {
    "version",
    "format",
    "checkpoint_format",
    "is_marlin_format",
    "pack_dtype",
    "meta",
    "model_name_or_path",
    "lm_head",
}
"""How other packages store or load a checkpoint: nothing that quantizing depends on, except a quantized output head."""


def from_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names that GPTQ's and AWQ's packages gave them -> the arguments spec, algorithm and skip of `patch`.

        quantlib.patch(model, **from_options({"bits": 4, "group_size": 128, "desc_act": True}), calibration=tokens)
        quantlib.patch(model, **from_options({"w_bit": 4, "q_group_size": 128, "zero_point": True}), calibration=tokens)

    GPTQ      bits, group_size (-1: a row), sym (default True), desc_act, static_groups, damp_percent, block_size,
              true_sequential (always so)
    AWQ       w_bit or bits, q_group_size or group_size, zero_point (default True), n_grid, duo_scaling, apply_clip
    both      quant_method ("gptq", "awq"; else told from the names), modules_to_not_convert (parts of names, besides the head)

    What isn't given has the default of `GPTQ` or `AWQ` here; groups have 128 columns. Names that say how a checkpoint is stored
    are read over. Raises QuantlibError for other names, for a mixture of both, and for what can't be done.
    """
    wanted = {name: value for name, value in options.items() if name not in _OF_FILES and value is not None}
    method = _method(wanted)
    known = _AWQ if method == "awq" else _GPTQ
    for name in wanted:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise QuantlibError(
                f"option {name!r} is none of {method}'s; did you mean {nearest!r}? Known: {', '.join(sorted(known))}"
            )
    for alias, name in _ALIASES.items():
        if alias in wanted:
            if wanted.get(name, wanted[alias]) != wanted[alias]:
                raise QuantlibError(f"options {alias}={wanted[alias]!r} and {name}={wanted[name]!r} disagree")
            wanted[name] = wanted.pop(alias)
    if options.get("lm_head"):
        raise QuantlibError("option lm_head=True: the output head stays as it is; pass skip=() to patch to quantize it as well")
    if not wanted.pop("true_sequential", True):
        raise QuantlibError("option true_sequential=False: layers are always calibrated behind those quantized before; drop it")
    wanted.pop("quant_method", None)
    spec = _spec(wanted, method)
    left = tuple(f"*{name}*" for name in wanted.pop("modules_to_not_convert", ()))
    algorithm: Algorithm = AWQ(**wanted) if method == "awq" else GPTQ(**wanted)
    return {"spec": spec, "algorithm": algorithm, "skip": (*DEFAULT_SKIP, *left)}


def _method(options: Mapping[str, Any]) -> str:
    named = options.get("quant_method")
    if named is not None:
        if named not in ("gptq", "awq"):
            raise QuantlibError(f"option quant_method={named!r} can't be read; expected 'gptq' or 'awq'")
        return str(named)
    return "awq" if (_AWQ - _GPTQ) & set(options) else "gptq"


def _spec(options: dict[str, Any], method: str) -> str:
    """The name of the format; takes what it reads out of `options`."""
    bits, group_size = options.pop("bits", 4), options.pop("group_size", 128)
    symmetric = not options.pop("zero_point", True) if method == "awq" else options.pop("sym", True)
    if bits not in (2, 3, 4, 8):
        raise QuantlibError(f"option bits={bits!r}: integer formats have 2, 3, 4 or 8 bits")
    return get_format(f"int{bits}", group_size=group_size, symmetric=bool(symmetric)).name

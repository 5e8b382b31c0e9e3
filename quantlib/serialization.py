"""save and load: a patched model as a directory, without pickle.

A transformers model is rebuilt from its config.json; any other model is loaded into an instance that the caller builds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.checkpoints import native
from quantlib.errors import CheckpointError
from quantlib.formats import get_format
from quantlib.nn import QuantLinear, replace_module
from quantlib.nn.linear import FORMAT_KEY


def save(model: nn.Module, path: str | Path, format: str = "native", tokenizer: Any = None) -> Path:
    """Write a patched model to a directory: `model.safetensors`, `quantlib.json`, and a transformers model's config.

    The directory appears whole or not at all; an earlier checkpoint of quantlib's there is replaced. tokenizer: saved with it.
    Raises CheckpointError (nothing quantized, a path in use, a full disk, weights without data).
    """
    if format != "native":
        raise CheckpointError(f"format {format!r} can't be written; known: native")
    named = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in named if isinstance(module, QuantLinear)}
    if not layers:
        raise CheckpointError("the model holds no QuantLinear; call quantlib.patch(model, spec) before quantlib.save")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(FORMAT_KEY)}
    meta = [name for name, tensor in state.items() if tensor.is_meta]
    if meta:
        raise CheckpointError(f"{meta[0]} and {len(meta) - 1} more tensors are on the meta device and hold no data")
    target = Path(path)
    with native.atomic_directory(target) as directory:
        manifest = {
            "class": type(model).__name__,
            "layers": {name: _describe(layer) for name, layer in layers.items()},
            "computed_buffers": _computed_buffers(model),
        }
        native.write(directory, state, manifest)
        for companion in (getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer):
            write = getattr(companion, "save_pretrained", None)
            if write is not None:
                write(directory)
    return target


def _describe(layer: QuantLinear) -> dict[str, Any]:
    return {
        "format": layer.format.name,
        "shape": [layer.out_features, layer.in_features],
        "bias": layer.bias is not None,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "activations": layer.activations,
        "kernel": layer.kernel,
    }


def _computed_buffers(model: nn.Module) -> dict[str, str]:
    """Name -> dtype of the float buffers that a model computes and does not save (rotary tables)."""
    saved = model.state_dict()
    floats = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point() and name not in saved}
    return {name: str(buffer.dtype).removeprefix("torch.") for name, buffer in floats.items()}


def load(path: str | Path, device: torch.device | str = "cpu", model: nn.Module | None = None) -> nn.Module:
    """Read what `save` wrote.

    model   an instance of the original, unpatched architecture to fill in place (its weights may be on the meta device);
            default: built by transformers from the directory's config.json (needs the extra `transformers`)
    device  where the model goes; on the CPU the tensors stay mapped from the file

    Returns the model in evaluation mode. Raises CheckpointError for missing, damaged or unfitting files, FormatError for a
    format that isn't registered.
    """
    directory = Path(path)
    manifest = native.read_manifest(directory)
    formats = {name: get_format(entry["format"]) for name, entry in manifest["layers"].items()}
    tensors = native.read_tensors(directory)
    target = _empty_model(directory, manifest["class"]) if model is None else model
    _check_layers(target, manifest["layers"])
    _check_names(target, manifest["layers"], tensors)
    for name, entry in manifest["layers"].items():
        n, k = entry["shape"]
        formats[name].check(_own_parts(tensors, name, entry["bias"]), n, k, name)
    for name, entry in manifest["layers"].items():
        n, k = entry["shape"]
        dtype = getattr(torch, entry["dtype"])
        old = target.get_submodule(name)
        if not isinstance(old, QuantLinear):
            new = QuantLinear(k, n, entry["bias"], formats[name], "meta", dtype, entry["activations"], entry["kernel"])
            replace_module(target, old, new)
    target.load_state_dict(tensors, strict=True, assign=True)
    for name, dtype_name in manifest["computed_buffers"].items():
        module_name, _, buffer_name = name.rpartition(".")
        owner = target.get_submodule(module_name)
        owner._buffers[buffer_name] = target.get_buffer(name).to(getattr(torch, dtype_name))
    tie: Any = getattr(target, "tie_weights", None)
    if tie is not None:
        tie()
    target.to(device)
    for module in target.modules():
        if isinstance(module, QuantLinear):
            module.prepare()
    return target.eval()


def _empty_model(directory: Path, name: str) -> nn.Module:
    """A transformers model without weights: parameters on the meta device, buffers (rotary tables) computed."""
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} holds no config.json: pass model=, an instance of the architecture to load into")
    try:
        import accelerate
        import transformers
    except ImportError as error:
        raise CheckpointError("this checkpoint is a transformers model; install quantlib-kernels[transformers]") from error
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise CheckpointError(
            f"the checkpoint's class {name} is unknown to transformers {transformers.__version__}; pass model="
        )
    config = transformers.AutoConfig.from_pretrained(directory)
    with accelerate.init_empty_weights(include_buffers=False):
        empty: nn.Module = architecture(config)
    return empty


def _check_layers(model: nn.Module, layers: dict[str, Any]) -> None:
    for name, entry in layers.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(f"the checkpoint holds the layer {name}, the model does not") from None
        shape = [getattr(module, "out_features", None), getattr(module, "in_features", None)]
        if not isinstance(module, nn.Linear) or shape != entry["shape"]:
            raise CheckpointError(f"{name}: the checkpoint holds a linear layer {entry['shape']}, the model {module}")


def _own_parts(tensors: dict[str, Tensor], name: str, bias: bool) -> dict[str, Tensor]:
    prefix = name + "."
    parts = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if bias:
        parts.pop("bias", None)
    return parts


def _check_names(model: nn.Module, layers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Everything outside the quantized layers must be there, and nothing else."""

    def outside(name: str) -> bool:
        return name.rpartition(".")[0] not in layers

    expected = {name for name in model.state_dict() if outside(name)}
    found = {name for name in tensors if outside(name)}
    if expected != found:
        missing, surplus = sorted(expected - found), sorted(found - expected)
        raise CheckpointError(
            f"the checkpoint does not fit the model: it lacks {missing[:3]} ({len(missing)}), "
            f"and holds {surplus[:3]} ({len(surplus)}) that the model has no place for"
        )

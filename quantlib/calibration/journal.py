"""A journal of quantized layers on disk: a run that was killed goes on where it stopped, and ends with the same bits.

    journal.json              what is being done: model, formats, algorithm, calibration tokens
    LAYER.safetensors         a layer's parts, written under another name, synced, renamed
    LAYER+scales.safetensors  factors folded into a block before its first layer is quantized

Layers are quantized in a fixed order from inputs that depend on the layers before alone, so that a run which takes those from
the journal computes the same inputs again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quantlib.errors import CheckpointError
from quantlib.formats import get_format
from quantlib.tensor import QuantizedTensor

VERSION = 1
HEADER = "journal.json"
FACTORS = "+scales"


class Journal:
    """The quantized layers of one run, kept in a directory.

    directory  made where it isn't there; one with the journal of the same run is gone on with
    identity   plain data that two runs with equal results share

    Raises CheckpointError where the directory holds the journal of another run, or something else.
    """

    def __init__(self, directory: str | Path, identity: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        wanted = {"version": VERSION, **json.loads(json.dumps(identity))}
        header = self.directory / HEADER
        if header.is_file():
            self._check(header, wanted)
            return
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise CheckpointError(f"{self.directory} exists and holds no journal: name a new directory, or an empty one")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"the journal {self.directory} can't be made: {error}") from error
        self._write(HEADER, lambda path: path.write_text(json.dumps(wanted, indent=1) + "\n"))

    def _check(self, header: Path, wanted: dict[str, Any]) -> None:
        try:
            found = dict(json.loads(header.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{header} can't be read as a journal's header: {error}; remove the directory") from None
        differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        if differing:
            key = differing[0]
            raise CheckpointError(
                f"{self.directory} is the journal of another run: it differs in {', '.join(differing)} "
                f"({key}: {_short(found.get(key))}, here {_short(wanted.get(key))}); repeat that run's arguments, "
                "or name another directory"
            )

    def __contains__(self, name: str) -> bool:
        return self._file(name).is_file()

    def get(self, name: str) -> QuantizedTensor:
        """A layer's weight in the rows layout. Raises CheckpointError for a damaged file."""
        file = self._file(name)
        try:
            with safe_open(file, framework="pt") as opened:
                facts = opened.metadata()
                parts = {part: opened.get_tensor(part).clone() for part in opened.keys()}  # noqa: SIM118
            fmt = get_format(facts["format"])
            n, k = json.loads(facts["shape"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); remove it, and the layer is quantized again") from error
        fmt.check(parts, n, k, name)
        return QuantizedTensor(fmt, (n, k), {part: parts[part] for part in fmt.specs(n, k)})

    def put(self, name: str, weight: QuantizedTensor) -> None:
        """Keep a layer's weight; after this returns, no crash loses it. Raises CheckpointError where the disk is full."""
        rows = weight.to_layout("rows")
        facts = {"format": rows.format.name, "shape": json.dumps(rows.shape)}
        parts = {part: tensor.contiguous().cpu() for part, tensor in rows.parts.items()}
        self._write(self._file(name).name, lambda path: save_file(parts, path, metadata=facts))

    def get_factors(self, name: str) -> dict[str, Tensor] | None:
        """What `put_factors` kept under a name; None where there is nothing. Raises CheckpointError for a damaged file."""
        file = self._file(name + FACTORS)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                return {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); remove the journal and start anew") from error

    def put_factors(self, name: str, factors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name. Raises as `put`."""
        tensors = {key: tensor.contiguous().cpu() for key, tensor in factors.items()}
        self._write(self._file(name + FACTORS).name, lambda path: save_file(tensors, path))

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _write(self, name: str, write: Any) -> None:
        target = self.directory / name
        scratch = self.directory / f".{name}.{os.getpid()}"
        try:
            write(scratch)
            for path in (scratch, self.directory):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                if path is scratch:
                    scratch.replace(target)
        except (OSError, SafetensorError) as error:
            scratch.unlink(missing_ok=True)
            raise CheckpointError(
                f"{target} can't be written: {error}; what {self.directory} holds is whole: make room and start again with the "
                "same arguments, and the run goes on from there"
            ) from error


def digest_tensor(tensor: Tensor) -> str:
    """16 hex digits over all bytes."""
    return hashlib.sha256(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


SAMPLED = 64


def digest_model(model: nn.Module) -> str:
    """16 hex digits over the name, shape, dtype and SAMPLED evenly spaced elements of every parameter."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLED)
        found.update(f"{name} {list(parameter.shape)} {parameter.dtype} ".encode())
        found.update(flat[::step].cpu().to(torch.float64).numpy().tobytes())
    return found.hexdigest()[:16]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."

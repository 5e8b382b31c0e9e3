"""The native checkpoint: a directory with `quantlib.json` (what the tensors are) and `model.safetensors` (the tensors, mapped).

Writing is atomic: everything goes to a temporary directory beside the target, is synced, and takes the target's name in one
rename. A crash leaves the old checkpoint or the new one, never a half.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantlib.errors import CheckpointError

VERSION = 1
MANIFEST = "quantlib.json"
TENSORS = "model.safetensors"


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A new directory that becomes `path` when the block ends well, and vanishes when it doesn't.

    Raises CheckpointError where `path` exists and is neither an empty directory nor an earlier native checkpoint.
    """
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / MANIFEST).exists())):
        raise CheckpointError(f"{path} exists and is no quantlib checkpoint; choose another path or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield scratch
        for file in scratch.iterdir():
            _sync(file)
        _sync(scratch)
        _swap(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(scratch: Path, path: Path) -> None:
    old = scratch.with_name(scratch.name + ".old")
    if path.exists():
        path.rename(old)
    try:
        scratch.chmod(0o755)
        scratch.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(directory: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """Write the two files into an existing directory. Tensors that share storage are written once and named as aliases."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        kept[name] = tensor.contiguous()
    try:
        save_file(kept, directory / TENSORS, metadata={"format": "pt"})
        text = json.dumps({"version": VERSION, **manifest, "aliases": aliases}, indent=1)
        (directory / MANIFEST).write_text(text + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't write the checkpoint in {directory.parent}: {error}; nothing was left behind") from error


def read_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest. Raises CheckpointError where there is none, or one that this version can't read."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path} holds no {MANIFEST}: not a checkpoint that quantlib.save wrote")
    try:
        manifest = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is no JSON object: {error}") from None
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{file} has version {manifest.get('version')!r}; this quantlib reads version {VERSION}")
    return manifest


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Every tensor, aliases included; on the CPU they are views of the mapped file. Raises CheckpointError for damage."""
    manifest = read_manifest(path)
    try:
        with safe_open(path / TENSORS, framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / TENSORS} can't be read: {error}") from error
    for alias, name in manifest["aliases"].items():
        if name not in tensors:
            raise CheckpointError(f"{path / TENSORS} lacks {name}, which {alias} is an alias of")
        tensors[alias] = tensors[name]
    return tensors

"""`quantlib inspect`: what a format is, or what a checkpoint holds."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from quantlib.cli.console import out
from quantlib.errors import CheckpointError, ShapeError

MSE_SHAPE = (1024, 1024)


def inspect(
    target: Annotated[
        str,
        typer.Argument(help="A format ('nvfp4', 'int4-g64-asym'), a directory written by quantlib, or a .safetensors file."),
    ],
    shape: Annotated[
        str, typer.Option(help="For a format: the weight NxK (out x in features) whose bytes are counted.")
    ] = "4096x4096",
) -> None:
    """Describe a format (codec, block, scales, bytes, error on Gaussians) or list a checkpoint's layers."""
    path = Path(target)
    if (path / "quantlib.json").is_file():
        _inspect_checkpoint(path)
    elif path.name == "quantlib.json" and path.is_file():
        _inspect_checkpoint(path.parent)
    elif path.is_file() and path.suffix == ".safetensors":
        _inspect_safetensors(path)
    elif path.exists():
        raise CheckpointError(f"{path} is neither a directory that quantlib.save wrote nor a .safetensors file")
    else:
        _inspect_format(target, _parse_shape(shape))


def _parse_shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\s*[x,×]\s*(\d+)", text.strip())
    if match is None or not (int(match[1]) and int(match[2])):
        raise ShapeError(f"--shape {text!r} is no NxK, e.g. 4096x4096")
    return int(match[1]), int(match[2])


def _inspect_format(spec: str, shape: tuple[int, int]) -> None:
    from quantlib.formats import get_format

    fmt = get_format(spec)
    n, k = shape
    facts = Table(title=fmt.name, title_justify="left", show_header=False)
    facts.add_row("codec", f"{fmt.codec.kind}, {fmt.codec.bits} bits")
    facts.add_row("values", _values(fmt.codec.entries))
    facts.add_row("block", f"{_extent(fmt.block.rows, 'rows')} x {_extent(fmt.block.cols, 'columns')} share a scale")
    facts.add_row("scale", f"{fmt.scale.kind}: {fmt.scale}")
    facts.add_row("zero", fmt.zero)
    facts.add_row("bits per weight", f"{fmt.bits_per_weight(n, k):.4f} for [{n}, {k}]")
    facts.add_row("bytes", f"{fmt.nbytes(n, k):,} ({2 * n * k / fmt.nbytes(n, k):.2f}x smaller than 16-bit)")
    for search in ("absmax", "mse"):
        facts.add_row(f"MSE, {search}", f"{_gaussian_mse(fmt, search):.3e} on 2^20 unit Gaussians")
    out.print(facts)
    parts = Table("part", "dtype", "shape", "bytes", title=f"stored for [{n}, {k}]", title_justify="left")
    for name, part in fmt.specs(n, k).items():
        parts.add_row(name, str(part.dtype).removeprefix("torch."), str(list(part.shape)), f"{part.nbytes:,}")
    out.print(parts)


def _extent(size: int | None, what: str) -> str:
    return f"all {what}" if size is None else f"{size} {what.removesuffix('s') if size == 1 else what}"


def _values(entries: tuple[float, ...]) -> str:
    finite = sorted({entry for entry in entries if abs(entry) < float("inf")})
    if len(finite) <= 16:
        return " ".join(f"{entry:.4g}" for entry in finite)
    return f"{len(finite)} values, {finite[0]:.4g} to {finite[-1]:.4g}"


def _gaussian_mse(fmt: Any, search: Any) -> float:
    import torch

    weight = torch.randn(MSE_SHAPE, generator=torch.Generator().manual_seed(0))
    parts = fmt.fit(weight, search=search)
    decoded = fmt.decode({"codes": fmt.encode(weight, parts), **parts}, *MSE_SHAPE)
    return float((decoded - weight).square().mean())


def _inspect_checkpoint(path: Path) -> None:
    from quantlib.checkpoints.native import read_manifest
    from quantlib.formats import get_format

    manifest = read_manifest(path)
    groups: dict[tuple[str, str, tuple[int, int]], list[str]] = {}
    for name, entry in manifest["layers"].items():
        n, k = entry["shape"]
        groups.setdefault((name.rsplit(".", 1)[-1], entry["format"], (n, k)), []).append(name)
    table = Table(title=f"{path}: {manifest['class']}, {len(manifest['layers'])} quantized layers", title_justify="left")
    for header in ("layers", "count", "format", "shape", "bits/weight", "MB"):
        table.add_column(header, justify="left" if header in ("layers", "format", "shape") else "right")
    packed = weights = 0
    for (_, spec, (n, k)), names in groups.items():
        fmt, count = get_format(spec), len(names)
        packed += count * fmt.nbytes(n, k)
        weights += count * n * k
        label = names[0] if count == 1 else f"{names[0]} .. {names[-1]}"
        size = f"{count * fmt.nbytes(n, k) / 1e6:.2f}"
        table.add_row(label, str(count), spec, f"{n} x {k}", f"{fmt.bits_per_weight(n, k):.3f}", size)
    on_disk = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    mean = 8 * packed / weights if weights else 0.0
    table.caption = (
        f"{packed / 1e6:.2f} MB packed at {mean:.3f} bits per weight; {on_disk / 1e6:.2f} MB on disk with everything else"
    )
    out.print(table)


def _inspect_safetensors(path: Path) -> None:
    """Any other file: its tensors as the header names them, without reading one."""
    from safetensors import SafetensorError, safe_open

    table = Table("tensor", "dtype", "shape", title=str(path), title_justify="left")
    kinds: Counter[str] = Counter()
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                kinds[entry.get_dtype()] += 1
                table.add_row(name, entry.get_dtype(), str(entry.get_shape()))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    table.caption = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    out.print(table)

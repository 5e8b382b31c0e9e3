"""Tables and a picture from a run of bench.cpu. Only ratios: absolute times of a CPU that others share mean nothing elsewhere.

python -m bench.cpu_report bench/results/cpu-FILE.jsonl      Markdown
python -m bench.cpu_report --images docs/images FILE         and cpu.png
python -m bench.cpu_report --update                          README's block and its picture, from bench/results/cpu-*.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.cpu_layers import FORMATS
from bench.cpu_model import LLAMA
from bench.plots import cpu_picture
from bench.report import README, RESULTS, updated
from bench.results import Row, read_rows

BEGIN, END = "<!-- cpu bench: begin -->", "<!-- cpu bench: end -->"
IMAGES = README.parent / "docs" / "images"
COUNTERPARTS: dict[str, tuple[str, ...]] = {
    "int4-g128": ("torch_int4", "ggml q4_0"),
    "int4-g32": ("ggml q4_0",),
    "int4-g32-asym": ("ggml q4_1",),
    "nf4": ("bitsandbytes", "ggml q4_0"),
    "nvfp4": ("ggml q4_0",),
    "mxfp4": ("ggml q4_0",),
    "q4_k": ("ggml q4_k",),
    "fp8-e4m3": ("ggml q8_0",),
    "int8-channel": ("ggml q8_0",),
}
"""quantlib's format -> peers with weights of about as many bits, beside torch's unquantized products."""
UNQUANTIZED = "torch"
BASELINES = {UNQUANTIZED: ("torch_bf16", "torch_fp32", "torch bf16", "torch fp32")}
"""What stands for torch without quantization: the faster of its products in bf16 and in fp32, of layers and of whole models."""
SPOKEN = {"int4-g32-asym": "q4_1", "q4_k": "q4_k", "int8-channel": "q8_0"}
"""quantlib's format -> llama.cpp's type that its whole model is compared with; q4_0 for every other one."""
NOTHING = "No run has been recorded."


def latest_run(rows: Iterable[Row]) -> list[Row]:
    """Of each machine, operation, shape and M the newest run's rows; a run is what began at one time."""
    newest: dict[tuple[object, ...], str] = {}
    rows = [row for row in rows if row.settings]
    for row in rows:
        newest[_contest(row)] = max(newest.get(_contest(row), ""), row.date)
    return [row for row in rows if row.date == newest[_contest(row)]]


def _machine(row: Row) -> tuple[str, str, str]:
    return row.device, row.settings.get("isa", ""), row.settings.get("threads", "")


def _contest(row: Row) -> tuple[object, ...]:
    """What rows have in common that were measured in turns."""
    return _machine(row), row.operation, row.n, row.k, row.m


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines))


def share_of_reading(row: Row) -> float | None:
    """Bytes of the packed weight per second, over those that a plain read of a buffer reached in the same rounds."""
    return None if row.us is None or not row.nbytes or not row.read_gbps else row.nbytes / row.us / 1e3 / row.read_gbps


def bandwidth_table(rows: Sequence[Row]) -> str:
    """Markdown: at M = 1, who reads its weight at which share of the read bandwidth."""
    first = [row for row in rows if row.m == 1 and row.operation == "linear"]
    shown = sorted(((share, row) for row in first if (share := share_of_reading(row)) is not None), key=lambda pair: -pair[0])
    lines = []
    for share, row in shown:
        bits = 8 * (row.nbytes or 0) / row.n / row.k
        lines.append([f"{row.n} x {row.k}", _who(row), f"{bits:.2f}", f"{share:.2f}"])
    return _markdown(["N x K", "who", "bits per weight", "share of the read bandwidth"], lines)


def _who(row: Row) -> str:
    return f"quantlib `{row.numbers}`" if row.ours else row.contestant


def layers_table(rows: Sequence[Row]) -> str:
    """Markdown: per shape, format and peer the peer's time over quantlib's at each M."""
    timed = [row for row in rows if row.ours and row.us is not None and row.operation in ("linear", "dgrad")]
    columns = list(dict.fromkeys((row.operation, row.m) for row in timed))
    columns.sort(key=lambda column: (column[0] != "linear", column[1]))
    lines = []
    kinds = sorted({(row.format, row.numbers) for row in timed}, key=lambda kind: (_place(kind[0]), kind))
    for n, k in dict.fromkeys((row.n, row.k) for row in timed):
        for fmt, numbers in kinds:
            found = {(row.operation, row.m): row.ratios for row in timed if (row.n, row.k, row.numbers) == (n, k, numbers)}
            for peer in (*COUNTERPARTS.get(fmt, ()), UNQUANTIZED):
                cells = [_ratio(found.get(column, {}), peer) for column in columns]
                if any(cells):
                    lines.append([f"{n} x {k}", f"`{numbers}`", peer, *(f"{cell:.2f}" if cell else "" for cell in cells)])
    names = [f"M = {m}" if operation == "linear" else f"dX, M = {m}" for operation, m in columns]
    return _markdown(["N x K", "format", "against", *names], lines)


def _ratio(ratios: Mapping[str, float], peer: str) -> float | None:
    """The ratio to a peer, or to the fastest of those that its name stands for."""
    return min((ratios[name] for name in BASELINES.get(peer, (peer,)) if name in ratios), default=None)


def _place(fmt: str) -> int:
    return FORMATS.index(fmt) if fmt in FORMATS else len(FORMATS)


def model_table(rows: Sequence[Row]) -> str:
    """Markdown: per variant of the model its tokens per second over those of llama.cpp's counterpart, and of torch."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        if row.operation not in ("generate", "prefill") or not row.ours or row.us is None:
            continue
        rival = LLAMA + SPOKEN.get(row.format, "q4_0")
        error = "" if row.error is None else f"{row.error:.3f}"
        line = lines.setdefault(row.contestant, [row.contestant.removeprefix("quantlib "), rival, "", "", "", "", error])
        for place, peer in enumerate((rival, UNQUANTIZED)):
            ratio = _ratio(row.ratios, peer)
            if ratio is not None:
                line[2 + 2 * place + (row.operation == "prefill")] = f"{ratio:.2f}"
    heads = ["quantlib", "llama.cpp's type", "tokens, of llama.cpp's", "prompt, of llama.cpp's"]
    return _markdown([*heads, "tokens, of torch's", "prompt, of torch's", "error of logits"], lines.values())


def peers_list(rows: Sequence[Row]) -> str:
    """Markdown: what llama.cpp's files hold, how far its logits are from the fp32 model's; who was not there, and why."""
    lines = [
        f"- {row.contestant}: {row.format}; error of logits {row.error:.3f}"
        for row in rows
        if row.operation == "prefill" and row.contestant.startswith(LLAMA) and row.error is not None
    ]
    lines += [
        f"- {row.contestant}: {row.reason}"
        for row in rows
        if row.reason and not (row.operation == "dgrad" and row.reason.startswith("does "))
    ]
    return "\n".join(dict.fromkeys(lines)) or "Everyone took part."


def provenance(rows: Sequence[Row]) -> str:
    """One line: where, on how many threads, and which versions."""
    settings = rows[0].settings
    distributions = {"bitsandbytes": "bitsandbytes", "ggml": "llama-cpp-python", "llama.cpp": "llama-cpp-python"}
    found = [f"{rows[0].device}, {settings['isa']}", f"{settings['threads']} threads"]
    for row in rows:
        peer = distributions.get(row.contestant.split(" ")[0])
        found += [f"torch {row.torch}"] + [f"{peer} {row.version}"] * (peer is not None and row.us is not None)
    found += [f"commit {row.commit}" for row in rows]
    return ", ".join(dict.fromkeys(found)) + "."


def machines(rows: Sequence[Row]) -> list[list[Row]]:
    """The latest run of each machine."""
    rows = latest_run(rows)
    return [[row for row in rows if _machine(row) == key] for key in dict.fromkeys(_machine(row) for row in rows)]


def latest_machine(rows: Sequence[Row]) -> list[Row]:
    """The latest run of the machine that was measured last: ratios of two machines don't belong into one picture."""
    return max(machines(rows), key=lambda run: max(row.date for row in run), default=[])


def readme_block(rows: Sequence[Row]) -> str:
    """What README shows of each machine: the model, the layers, and the picture."""
    parts = []
    for run in machines(rows):
        parts += [provenance(run)]
        if any(row.operation == "generate" and row.us for row in run):
            parts += [model_table(run), peers_list([row for row in run if row.operation == "prefill"])]
        if any(row.operation == "linear" and row.us for row in run):
            parts += [layers_table(run)]
    if cpu_picture(latest_machine(rows)) is not None:
        parts += ["![Layers and the demo model on a CPU, beside the peers](docs/images/cpu.png)"]
    return "\n\n".join(parts) or NOTHING


def document(rows: Sequence[Row]) -> str:
    """Everything in Markdown."""
    parts = ["# Measured on CPUs"]
    for run in machines(rows):
        parts += [provenance(run), "## A whole model", model_table(run)]
        parts += ["## Layers: a peer's time over quantlib's", layers_table(run)]
        parts += ["## Reading at M = 1", bandwidth_table(run), "## Peers", peers_list(run)]
    return "\n\n".join(parts if len(parts) > 1 else [*parts, NOTHING])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu_report", description="Tables and a picture from runs of bench.cpu."
    )
    parser.add_argument("files", nargs="*", type=Path, help="JSONL files (default: bench/results/cpu-*.jsonl)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="write cpu.png")
    parser.add_argument(
        "--update", action="store_true", help="replace the block between the markers in README.md, and its picture"
    )
    options = parser.parse_args(arguments)
    rows = read_rows(options.files or sorted(RESULTS.glob("cpu-*.jsonl")))
    images = options.images or (IMAGES if options.update else None)
    picture = cpu_picture(latest_machine(rows)) if images is not None else None
    if images is not None and picture is not None:
        images.mkdir(parents=True, exist_ok=True)
        (images / "cpu.png").write_bytes(picture)
    if options.update:
        README.write_text(updated(README.read_text(), readme_block(rows), BEGIN, END))
    else:
        print(document(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

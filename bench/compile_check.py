"""Compile every Triton kernel for every architecture, without a GPU, and compare the result with the committed table.

    python -m bench.compile_check            compile, check, compare with bench/results/compile-table.json; 1 where they differ
    python -m bench.compile_check --update   compile, check, write that table and docs/compile-table.md

Arguments, constexprs and options are those of a real launch: the kernels' own launchers build them, from tensors on the `meta`
device, and Triton's own specialization reads them. Checked in every row: the PTX holds the intended instruction, nothing is
spilled to local memory, shared memory fits the chip, and decoding holds no fused multiply-add, which would round otherwise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantlib.formats import get_format
from quantlib.kernels import triton_launch
from quantlib.tensor import QuantizedTensor

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "compile-table.json"
PAGE = ROOT / "docs" / "compile-table.md"

ARCHS = (80, 89, 90, 100, 103, 120, 121)
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 121: 101376}
"""Bytes of shared memory that one program may use, from the CUDA programming guide's table of compute capabilities."""

TENSOR_CORE = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 103: "tcgen05.mma"} | dict.fromkeys(
    (120, 121), "mma.sync"
)
WORKERS = 2
N, K, UNEVEN_K = 4096, 4096, 4088

FORMATS = (
    "int4-g128", "int4-g32-asym", "int3-g64-asym", "int8-channel", "nf4", "nf4-dq", "fp8-e4m3-block128", "fp8-e5m2",
    "nvfp4", "mxfp4", "mxfp8", "q4_k", "q6_k",
)  # fmt: skip
"""Every codec kind, scale kind, zero kind and number of bit planes."""

SIBLINGS = {89: 80, 103: 100, 121: 120}
"""Architectures that differ from another one only in ways these kernels don't use: fewer formats are compiled for them."""
SIBLING_FORMATS = ("int4-g128", "nf4-dq", "nvfp4", "mxfp8", "q4_k")
DETAILED_FORMATS = ("int4-g128", "nf4-dq", "q4_k")
"""Formats compiled for every tile and dtype: the plainest, the one with most shared memory, the one with most decoding."""


@dataclass(frozen=True, order=True)
class Case:
    """One launch of one kernel: m rows of x (0 for dequantize) of `dtype` times a weight [4096, k]."""

    kernel: str
    format: str
    dtype: str
    m: int
    k: int

    @property
    def name(self) -> str:
        rows = f" M={self.m}" if self.m else ""
        return f"{self.kernel}{rows} {self.format} {self.dtype}" + (f" K={self.k}" if self.k != K else "")


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case.

    `local`: bytes of local memory, which is where spills go. `fused`: FFMA instructions in machine code where decoding alone
    could hold them; None where the kernel itself multiplies and adds, or where another case decodes alike.
    """

    instruction: str
    registers: int
    shared: int
    local: int
    fused: int | None


def cases(arch: int) -> list[Case]:
    """The cases compiled for an architecture."""
    formats = SIBLING_FORMATS if arch in SIBLINGS else FORMATS
    found = []
    for fmt in formats:
        found += [Case("linear", fmt, "bfloat16", m, K) for m in (16, 512)]
        found += [Case("gemv", fmt, "bfloat16", 1, K), Case("dequantize", fmt, "bfloat16", 0, K)]
    for fmt in () if arch in SIBLINGS else DETAILED_FORMATS:
        found += [Case("linear", fmt, "bfloat16", m, K) for m in (32, 64)]
        found += [Case("linear", fmt, "float16", 512, K), Case("linear", fmt, "bfloat16", 512, UNEVEN_K)]
        found += [Case("linear", fmt, "float32", m, K) for m in (16, 512)]
        found += [Case("gemv", fmt, "bfloat16", m, K) for m in (2, 4)]
        found += [Case("gemv", fmt, "float32", 4, K), Case("gemv", fmt, "bfloat16", 4, UNEVEN_K)]
        found += [Case("dequantize", fmt, "float32", 0, K), Case("dequantize", fmt, "bfloat16", 0, UNEVEN_K)]
    return found


class CompileOnlyDriver:
    """Stands where Triton looks for a GPU: names the target to compile for, and can do nothing else."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # Compiled kernels are kept per device number, so every architecture gets one of its own.
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_of(arch: int, case: Case) -> triton_launch.Launch:
    """The launch that the case's problem leads to, on tensors without storage."""
    fmt, dtype = get_format(case.format), getattr(torch, case.dtype)
    specs = fmt.specs(N, case.k)
    parts = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    weight = QuantizedTensor(fmt, (N, case.k), parts)
    if case.kernel == "dequantize":
        return triton_launch.dequantize_launch(weight, torch.empty(N, case.k, dtype=dtype, device="meta"))
    x, y = (torch.empty(case.m, width, dtype=dtype, device="meta") for width in (case.k, N))
    bias = torch.empty(N, dtype=dtype, device="meta")
    if case.kernel == "gemv":
        return triton_launch.gemv_launch(x, weight, bias, y, triton_launch.gemv_tile(case.m, case.k))
    return triton_launch.linear_launch(x, weight, bias, y, triton_launch.linear_tile(case.m, case.k, dtype, arch))


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


_INSTRUCTION = re.compile(r"\b((?:mma\.sync|wgmma\.mma_async|tcgen05\.mma\.cta|fma\.rn\.f32)[\w.:]*)")


def instruction_of(ptx: str) -> str:
    """The widest kind of multiply instruction in the PTX: of the tensor cores, else fma, else none."""
    found = sorted(set(_INSTRUCTION.findall(ptx)))
    tensor_core = [name for name in found if not name.startswith("fma")]
    return ", ".join(tensor_core or found) or "none"


def shows_decoding(arch: int, case: Case) -> bool:
    """Whether the case is disassembled to look for fused multiply-adds.

    That takes as long as compiling, and the disassembler of Triton 3.6 knows neither sm_103 nor sm_121.
    """
    if arch in SIBLINGS:
        return False
    return case.kernel == "dequantize" or (case.kernel == "linear" and case.m == 16 and case.dtype != "float32")


def compile_case(arch: int, case: Case) -> Row:
    """Compile one case for one architecture and read the result."""
    from triton.runtime import driver

    driver.set_active(CompileOnlyDriver(arch))
    compiled = launch_of(arch, case).compile()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _tool("cuobjdump", "-res-usage", file.name))
        fused = _tool("nvdisasm", "-c", file.name).count("FFMA") if shows_decoding(arch, case) else None
    assert usage is not None, f"cuobjdump names no resources for {case.name} on sm_{arch}"
    registers, stack, local = map(int, usage.groups())
    return Row(
        instruction=instruction_of(compiled.asm["ptx"]),
        registers=registers,
        shared=compiled.metadata.shared,
        local=stack + local,
        fused=fused,
    )


def wanted_instruction(arch: int, case: Case) -> str:
    """How the instruction must begin."""
    if case.kernel == "dequantize":
        return "none"
    return "fma.rn.f32" if case.kernel == "gemv" or case.dtype == "float32" else TENSOR_CORE[arch]


def faults(arch: int, case: Case, row: Row) -> list[str]:
    """What is wrong with a compiled case, in words."""
    found = []
    wanted = wanted_instruction(arch, case)
    if not row.instruction.startswith(wanted):
        found.append(f"multiplies by {row.instruction}, {wanted} was intended")
    if row.local:
        found.append(f"uses local memory ({row.local})")
    if row.shared > SHARED_LIMIT[arch]:
        found.append(f"needs {row.shared} bytes of shared memory, the chip has {SHARED_LIMIT[arch]}")
    if row.fused:
        found.append(f"decodes with {row.fused} fused multiply-adds")
    return [f"sm_{arch} {case.name}: {fault}" for fault in found]


def _work(job: tuple[int, Case]) -> Row:
    torch.set_num_threads(1)
    return compile_case(*job)


Table = dict[str, dict[str, Row]]
"""sm_<arch> -> case name -> row."""


def compile_all() -> tuple[Table, list[str]]:
    """Every case on every architecture, and what is wrong."""
    jobs = [(arch, case) for arch in ARCHS for case in cases(arch)]
    table: Table = {f"sm_{arch}": {} for arch in ARCHS}
    wrong: list[str] = []
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for (arch, case), row in zip(jobs, pool.map(_work, jobs, chunksize=8), strict=True):
            table[f"sm_{arch}"][case.name] = row
            wrong += faults(arch, case, row)
    return table, wrong


def read_tables() -> dict[str, Table]:
    """The committed tables by Triton version."""
    if not TABLE.exists():
        return {}
    stored = json.loads(TABLE.read_text())
    return {
        version: {arch: {name: Row(**row) for name, row in rows.items()} for arch, rows in table.items()}
        for version, table in stored.items()
    }


def write_tables(tables: dict[str, Table]) -> None:
    """Write the machine-readable table, one row a line, and the page."""
    versions = []
    for version, table in sorted(tables.items()):
        archs = []
        for arch, rows in table.items():
            lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(asdict(row))}" for name, row in rows.items())
            archs.append(f"  {json.dumps(arch)}: {{\n{lines}\n  }}")
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(archs) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(versions) + "\n}\n")
    PAGE.write_text(render(tables))


def render(tables: dict[str, Table]) -> str:
    """The page for people."""
    lines = [
        "# What the Triton kernels compile to",
        "",
        "Written by `python -m bench.compile_check --update`; `make compile-check` and tests/test_compile_table.py compare",
        f"with it. Compiled without a GPU: no row says anything about speed. W is [{N}, {K}] unless K is named. No row uses",
        "local memory, and no decoding holds a fused multiply-add.",
    ]
    for version, table in sorted(tables.items(), reverse=True):
        lines += [
            "",
            f"## Triton {version}",
            "",
            *_instructions(table),
            "",
            "Registers per thread / bytes of shared memory:",
            "",
        ]
        names = list(dict.fromkeys(name for rows in table.values() for name in rows))
        lines += ["| case | " + " | ".join(table) + " |", "|---|" + "---|" * len(table)]
        for name in names:
            cells = [_cell(rows.get(name)) for rows in table.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row.registers} / {row.shared}"


def _instructions(table: Table) -> list[str]:
    lines = ["| architecture | instructions of `linear` in 16 bits |", "|---|---|"]
    for arch, rows in table.items():
        found = {row.instruction for name, row in rows.items() if name.startswith("linear") and "float32" not in name}
        lines.append(f"| {arch} | " + ", ".join(f"`{name}`" for name in sorted(found)) + " |")
    return lines


def differences(version: str, table: Table, tables: dict[str, Table]) -> list[str]:
    """Where a fresh table differs from the committed one of the same Triton version, or in its cases from any other."""
    if version not in tables:
        known = ", ".join(sorted(tables)) or "none"
        print(f"the committed tables are of Triton {known}; with {version} figures aren't compared, only faults are looked for")
        if not tables:
            return ["no table is committed: run python -m bench.compile_check --update"]
        committed = tables[max(tables)]
        return [
            f"{arch}: other cases than the committed table"
            for arch in table
            if set(table[arch]) != set(committed.get(arch, {}))
        ]
    found = []
    for arch in sorted(set(table) | set(tables[version])):
        fresh, committed_rows = table.get(arch, {}), tables[version].get(arch, {})
        found += [
            f"{arch} {name}: committed {committed_rows.get(name)}, compiled {fresh.get(name)}"
            for name in sorted(set(fresh) | set(committed_rows))
            if fresh.get(name) != committed_rows.get(name)
        ]
    return found


def main() -> int:
    """Run the check; 0 where nothing is wrong and nothing differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_check", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    options = parser.parse_args()
    # The interpreter would replace the very functions that are to be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    failure = triton_launch.import_failure()
    if failure is not None:
        print(failure)
        return 1
    import triton

    table, wrong = compile_all()
    tables = read_tables()
    if not wrong and options.update:
        write_tables({**tables, triton.__version__: table})
    elif not options.update:
        wrong += differences(triton.__version__, table, tables)
    print("\n".join(wrong))
    rows = sum(map(len, table.values()))
    print(f"Triton {triton.__version__}: {rows} kernels compiled for {len(table)} architectures, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

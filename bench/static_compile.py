"""Compiling one case for one architecture without a GPU, and reading what the compiler made of it."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.sass import Code, SassError, parse_all
from bench.static_cases import SIBLINGS, Case, Family
from bench.static_decode import Decode, analyse
from bench.static_families import family_of
from bench.static_traffic import Argument, Facts
from quantlib.formats import get_format
from quantlib.kernels.triton_launch import Launch


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case.

    instruction    the PTX multiply instruction
    registers      per thread; `local`: bytes of local memory, which is where spills go
    shared, tmem   bytes of shared memory, columns of tensor memory, per CTA
    warps, ctas    of a CTA; of the launch
    passes         how many CTAs decode the same weight
    fused          FFMA instructions in machine code where decoding alone could hold them; None where it isn't looked at
    loads          bytes of the widest and the narrowest load of codes in the main loop
    decode, loop   instructions per weight in the main loop: decoding, and all; None where it isn't looked at, or can't be
    """

    instruction: str
    registers: int
    shared: int
    tmem: int
    local: int
    warps: int
    ctas: int
    passes: int
    fused: int | None = None
    loads: tuple[int, int] | None = None
    decode: float | None = None
    loop: float | None = None


PARAMETERS = {80: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 103: 0x380, 120: 0x380, 121: 0x380}
"""Where arguments begin in constant bank 0."""

BINARIES = {80: "SM80", 89: "SM89", 90: "SM90a", 100: "SM100a", 103: "SM103a", 120: "SM120a", 121: "SM121a"}
"""nvdisasm's names of raw code."""


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


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SassError(f"{name}: {done.stderr.strip()}")
    return done.stdout


_INSTRUCTION = re.compile(r"\b((?:mma\.sync|wgmma\.mma_async|tcgen05\.mma\.cta|fma\.rn\.f32)[\w.:]*)")


def instruction_of(ptx: str) -> str:
    """The widest kind of multiply instruction in the PTX: of the tensor cores, else fma, else none."""
    found = sorted(set(_INSTRUCTION.findall(ptx)))
    tensor_core = [name for name in found if not name.startswith("fma")]
    return ", ".join(tensor_core or found) or "none"


def arguments_of(ptx: str, signature: dict[str, str], values: dict[str, Any], arch: int) -> tuple[Argument, ...]:
    """The kernel's arguments in constant bank 0. Those that Triton compiled in are not among them.

    Raises SassError where the PTX has fewer parameters than the signature.
    """
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    widths = [int(bits) // 8 for bits in re.findall(r"\.param \.[bfsu](\d+) (?:\.ptr [\w. ]+)?\w+_param_\d+", ptx)]
    if len(widths) < len(names):
        raise SassError(f"the PTX has {len(widths)} parameters, the kernel {len(names)}")
    found, offset = [], PARAMETERS[arch]
    for name, width in zip(names, widths, strict=False):
        offset = -(-offset // width) * width
        pointer = signature[name].startswith("*")
        value = values.get(name)
        number = None if pointer else int(value) if isinstance(value, int) else 0
        found.append(Argument(name, offset, max(width, 4), number))
        offset += width
    return tuple(found)


@dataclass(frozen=True)
class Compiled:
    """A case compiled for an architecture.

    row       None where it doesn't compile; decode: its main loop, where that was asked for and understood
    reason    why one of them is missing
    """

    arch: int
    case: Case
    row: Row | None = None
    decode: Decode | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Job:
    """A case to compile for an architecture; machine_code: whether it is disassembled."""

    arch: int
    case: Case
    machine_code: bool


def _facts(job: Job, family: Family, launch: Launch, compiled: Any) -> Facts:
    return Facts(
        arguments_of(compiled.asm["ptx"], compiled.src.signature, launch.arguments, job.arch),
        threads=32 * compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
        bits=get_format(job.case.format).codec.bits,
        codes=family.codes,
        x=family.x,
    )


def _fused(family: Family, code: Code | None, decode: Decode | None) -> int | None:
    """FFMA instructions where the family may hold none."""
    if code is None or family.exact == "free":
        return None
    if family.exact == "decode":
        return decode.opcodes["FFMA"] + decode.opcodes["FFMA2"] if decode else None
    if family.exact == "tensor" and not any(found.multiplies for found in code.instructions):
        return None
    return sum(found.base in ("FFMA", "FFMA2") for found in code.instructions)


@dataclass(frozen=True)
class _Built:
    """What Triton made of a job, and the launch that it was made for."""

    launch: Launch
    compiled: Any


def _build(job: Job) -> _Built:
    from triton.runtime import driver

    driver.set_active(CompileOnlyDriver(job.arch))
    launch = family_of(job.case).launch(job.arch, job.case)
    return _Built(launch, launch.compile())


def code_section(cubin: bytes) -> bytes:
    """The machine code in a cubin: the ELF section .text.<kernel>."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + number * size) for number in range(count)]
    for name, _, _, _, offset, length in sections:
        start = sections[names][4] + name
        if cubin[start:].startswith(b".text."):
            return cubin[offset : offset + length]
    raise SassError("the cubin holds no code")


def disassemble(arch: int, cubins: list[bytes]) -> list[Code]:
    """The codes of several kernels at once: starting nvdisasm takes longer than anything it does.

    The disassembler of Triton 3.6 knows neither sm_103 nor sm_121; their codes are those of sm_100 and sm_120.
    """
    sections = [code_section(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(sections))
        file.flush()
        try:
            listing = _tool("nvdisasm", "-ndf", "-b", BINARIES[arch], file.name)
        except SassError:
            if arch not in SIBLINGS:
                raise
            listing = _tool("nvdisasm", "-ndf", "-b", BINARIES[SIBLINGS[arch]], file.name)
    return parse_all(listing, [len(section) for section in sections])


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _tool("cuobjdump", "-res-usage", file.name))
    if usage is None:
        raise SassError("cuobjdump names no resources")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def _read(job: Job, built: _Built, code: Code | None) -> Compiled:
    """What is in a compiled kernel; `code` where it was disassembled."""
    case, family = job.case, family_of(job.case)
    launch, compiled = built.launch, built.compiled
    decode, reason = None, None
    if code is not None and family.codes:
        try:
            decode = analyse(code, _facts(job, family, launch, compiled))
        except SassError as error:
            reason = str(error)
    registers, local = _usage(compiled.asm["cubin"])
    block_m = launch.arguments.get("BLOCK_M")
    row = Row(
        instruction=instruction_of(compiled.asm["ptx"]),
        registers=registers,
        shared=compiled.metadata.shared,
        tmem=getattr(compiled.metadata, "tmem_size", None) or 0,
        local=local,
        warps=compiled.metadata.num_warps,
        ctas=math.prod(launch.grid),
        passes=-(-case.m // block_m) if block_m else 1,
        fused=_fused(family, code, decode),
        loads=(decode.loads[0], decode.loads[-1]) if decode else None,
        decode=round(decode.per_weight, 2) if decode else None,
        loop=round(decode.total_per_weight, 2) if decode else None,
    )
    return Compiled(job.arch, case, row, decode, reason)


def compile_jobs(jobs: Iterable[Job]) -> list[Compiled]:
    """Compile and read jobs, in their order; what goes wrong with one is in its `reason`."""
    jobs = list(jobs)
    built: dict[Job, _Built] = {}
    failed: dict[Job, str] = {}
    for job in jobs:
        try:
            built[job] = _build(job)
        except Exception as error:  # Triton's passes raise anything
            failed[job] = f"does not compile: {type(error).__name__}: {error}"
    codes: dict[bytes, Code] = {}
    for arch in dict.fromkeys(job.arch for job in built):
        cubins = list(
            dict.fromkeys(found.compiled.asm["cubin"] for job, found in built.items() if job.arch == arch and job.machine_code)
        )
        if cubins:
            codes |= zip(cubins, disassemble(arch, cubins), strict=True)
    return [
        _read(job, built[job], codes.get(built[job].compiled.asm["cubin"]) if job.machine_code else None)
        if job in built
        else Compiled(job.arch, job.case, reason=failed[job])
        for job in jobs
    ]

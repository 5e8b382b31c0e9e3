"""The reading of machine code, on small listings written by hand."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from bench.sass import SassError, parse, parse_all
from bench.static_decode import Decode, analyse
from bench.static_traffic import Argument, Facts

ARGUMENTS = (
    Argument("x", 0x210, 8, None),
    Argument("codes", 0x218, 8, None),
    Argument("scales", 0x220, 8, None),
    Argument("table", 0x228, 8, None),
    Argument("K", 0x230, 4, 4096),
)


def listing(text: str) -> str:
    """Instructions, one a line, with addresses as nvdisasm prints them; a line that ends in a colon is a label."""
    lines, address = [], 0
    for line in text.strip().splitlines():
        line = line.strip()
        if line.endswith(":"):
            lines.append(line)
            continue
        lines.append(f"        /*{address:04x}*/                   {line} ;")
        address += 16
    return "\n".join(lines)


def counted(text: str, bits: int = 4, threads: int = 32) -> Decode:
    return analyse(parse(listing(text)), Facts(ARGUMENTS, threads=threads, shared=8192, bits=bits))


def roles(decode: Decode, role: str) -> list[str]:
    """The opcodes of the instructions in a role, in order."""
    return [found.base for found in decode.body if decode.roles[found.address] == role]


# Words of the next iteration are loaded while those of this one are decoded; the scale is converted in the loop.
PREFETCH = """
    S2R R0, SR_TID.X
    ULDC.64 UR4, c[0x0][0x218]
    ULDC.64 UR6, c[0x0][0x210]
    ULDC.64 UR8, c[0x0][0x220]
    IMAD.MOV.U32 R2, RZ, RZ, UR4
    IMAD.MOV.U32 R3, RZ, RZ, UR5
    IMAD.WIDE.U32 R2, R0, 0x10, R2
    IMAD.MOV.U32 R4, RZ, RZ, UR6
    IMAD.MOV.U32 R5, RZ, RZ, UR7
    LDG.E.128 R8, desc[UR10][R2.64]
    UMOV UR12, 0x10
.L_x_1:
    IADD3 R2, P0, R2, 0x200, RZ
    IMAD.X R3, RZ, RZ, R3, P0
    IMAD.MOV.U32 R20, RZ, RZ, R8
    LDG.E.U16 R30, desc[UR10][R4.64+0x40]
    LDG.E.64 R24, desc[UR10][R4.64]
    LDG.E.128 R8, desc[UR10][R2.64]
    LDG.E.U16 R31, desc[UR10][UR8.64]
    IMAD.U32 R32, R31, 0x10000, RZ
    IMAD.MOV.U32 R33, RZ, RZ, 0x43004300
    SHF.R.U32.HI R21, RZ, 0x4, R20
    LOP3.LUT R20, R20, 0xf000f, R33, 0xea, !PT
    LOP3.LUT R21, R21, 0xf000f, R33, 0xea, !PT
    HFMA2.BF16_V2 R20, R20, R32.H0_H0, -RZ
    HFMA2.BF16_V2 R21, R21, R32.H0_H0, -RZ
    HMMA.16816.F32.BF16 R12, R20, R24, R12
    FMUL R16, R12, R32
    UIADD3 UR12, UR12, -0x1, URZ
    UISETP.NE.U32.AND UP0, UPT, UR12, URZ, UPT
    BRA.U UP0, `(.L_x_1)
    EXIT
"""


def test_a_listing_is_read() -> None:
    code = parse(listing(PREFETCH))
    wide = next(found for found in code.instructions if found.opcode == "IMAD.WIDE.U32")
    assert (wide.writes, wide.reads) == (("R2", "R3"), ("R0", "R2", "R3"))
    load = next(found for found in code.instructions if found.opcode == "LDG.E.128")
    assert (load.writes, load.addresses, load.bytes) == (("R8", "R9", "R10", "R11"), ("R2", "R3"), 16)
    carry = next(found for found in code.instructions if found.opcode == "IADD3")
    assert carry.writes == ("R2", "P0")
    (loop,) = code.loops
    assert code.body(loop)[0].opcode == "IADD3"
    assert code.body(loop)[-1].opcode == "BRA.U"


def test_guards_and_branches_to_addresses_are_read() -> None:
    code = parse("/*0000*/  @!P0 BRA 0x20 ;\n/*0010*/  @P1 STG.E.64 [R4.64], R6 ;\n/*0020*/  EXIT ;")
    branch, store, _ = code.instructions
    assert (branch.guard, branch.target) == ("!P0", 0x20)
    assert (store.writes, store.data, store.guards) == ((), ("R6", "R7"), ("P1",))
    assert [block.successors for block in code.blocks] == [(1, 2), (2,), ()]


def test_schedules_are_left_out() -> None:
    code = parse("/*0000*/  IADD3 R0, PT, PT, R1, R2, RZ   &req={1,2} &wr=0x1   ?WAIT2_END_GROUP;\n/*0010*/  EXIT  ?trans1 ;")
    assert [found.text for found in code.instructions] == ["IADD3 R0, PT, PT, R1, R2, RZ", "EXIT"]


def test_64_bit_minima_are_read() -> None:
    (minimum,) = parse("/*0000*/  IMNMX.S64 PT, PT, R14, R10, UR4, PT, !PT ;").instructions
    assert (minimum.writes, minimum.data) == (("R14", "R15"), ("R10", "R11", "UR4", "UR5"))


def test_kernels_that_follow_each_other_are_kept_apart() -> None:
    lines = listing("FADD R0, R0, R1\nBRA 0x10\nFMUL R0, R0, R1\nBRA 0x30")
    first, second = parse_all(lines, [32, 32])
    assert [found.base for found in first.instructions] == ["FADD", "BRA"]
    assert (second.instructions[0].base, second.instructions[1].target) == ("FMUL", 0x10)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no instruction"), ("BRA `(.L_x_9)", "jumps to"), ("BRA 0x40", "jumps to")],
)
def test_a_broken_listing_is_refused(text: str, words: str) -> None:
    with pytest.raises(SassError, match=words):
        parse(listing(text))


def test_decoding_is_what_lies_between_load_and_product() -> None:
    decode = counted(PREFETCH)
    # The copy of the word, the scale's conversion, the constant, and the arithmetic: not addresses, x, sums or the counter.
    assert roles(decode, "decode") == ["IMAD", "IMAD", "IMAD", "SHF", "LOP3", "LOP3", "HFMA2", "HFMA2"]
    assert roles(decode, "load w") == ["LDG"]
    assert roles(decode, "use") == ["HMMA"]
    assert roles(decode, "acc") == ["FMUL"]
    assert decode.loads == (16,)
    assert decode.weights == 32 * 32
    assert decode.per_weight == 8 / 32
    assert decode.total_per_weight == 19 / 32
    assert decode.doubts == ()


def test_weights_that_several_threads_load_count_once() -> None:
    shared = PREFETCH.replace(
        "IMAD.WIDE.U32 R2, R0, 0x10, R2", "LOP3.LUT R0, R0, 0xf, RZ, 0xc0, !PT\nIMAD.WIDE.U32 R2, R0, 0x10, R2"
    )
    assert counted(shared).weights == 16 * 32
    assert counted(shared).per_weight == 2 * counted(PREFETCH).per_weight


def test_more_work_between_load_and_product_costs_more() -> None:
    wasteful = PREFETCH.replace("HMMA", "PRMT R20, R20, 0x5410, RZ\n    HMMA", 1)
    assert counted(wasteful).decode == counted(PREFETCH).decode + 1


def test_narrow_loads_are_seen() -> None:
    narrow = PREFETCH.replace("LDG.E.128 R8", "LDG.E.U8 R8")
    assert counted(narrow).loads == (1,)


# Codes go through shared memory, and are decoded into shared memory, from where another thread reads them; x lies behind them.
SHARED = """
    S2R R0, SR_TID.X
    ULDC.64 UR4, c[0x0][0x218]
    ULDC.64 UR6, c[0x0][0x210]
    IMAD.SHL.U32 R1, R0, 0x10, RZ
    LOP3.LUT R2, R1, 0x1f0, RZ, 0x3c, !PT
    IADD3 R4, P0, R1, UR4, RZ
    IADD3.X R5, RZ, UR5, RZ, P0, !PT
    IADD3 R6, P0, R1, UR6, RZ
    IADD3.X R7, RZ, UR7, RZ, P0, !PT
    UMOV UR8, 0xffffffff
.L_x_1:
    UIADD3 UR8, UR8, 0x1, URZ
    UISETP.GT.AND UP0, UPT, UR8, 0x1, UPT
    USEL UR8, UR8, URZ, !UP0
    IMAD.U32 R8, RZ, RZ, UR8
    IMAD R8, R8, 0x200, R1
    LDGSTS.E.BYPASS.128 [R8], [R4.64]
    LDGSTS.E.BYPASS.128 [R8+0x1000], [R6.64]
    BAR.SYNC.DEFER_BLOCKING 0x0
    LDS.128 R12, [R8]
    LOP3.LUT R12, R12, 0xf000f, RZ, 0xc0, !PT
    STS.128 [R1+0x800], R12
    BAR.SYNC.DEFER_BLOCKING 0x0
    LDS.128 R16, [R2+0x800]
    LDS.64 R20, [R8+0x1000]
    HMMA.16816.F32.BF16 R24, R16, R20, R24
    IADD3 R4, P0, R4, 0x200, RZ
    IMAD.X R5, RZ, RZ, R5, P0
    BRA `(.L_x_1)
"""


def test_values_are_followed_through_shared_memory() -> None:
    decode = counted(SHARED)
    assert roles(decode, "decode") == ["LDS", "LOP3", "STS", "LDS"]
    assert roles(decode, "load") == ["LDGSTS", "LDS"]
    assert decode.loads == (16,)
    assert decode.doubts == ()


def test_an_address_that_is_not_understood_is_told() -> None:
    broken = SHARED.replace("LDS.128 R12, [R8]", "POPC R9, R8\n    LDS.128 R12, [R9]")
    (doubt,) = counted(broken).doubts
    assert "LDS.128 R12, [R9]" in doubt


def test_weights_that_never_reach_the_product_are_told() -> None:
    broken = SHARED.replace("LDS.128 R16, [R2+0x800]", "LDS.128 R16, [R8+0x1000]")
    assert counted(broken).doubts == ("nothing made from codes reaches the multiplication",)


def test_a_loop_without_codes_is_refused() -> None:
    with pytest.raises(SassError, match="no codes"):
        counted(SHARED.replace("[R4.64]", "[R6.64]"))


# A table in global memory, read by code; fused multiply-adds multiply.
LOOKUP = """
    S2R R0, SR_TID.X
    ULDC.64 UR4, c[0x0][0x218]
    ULDC.64 UR6, c[0x0][0x210]
    ULDC.64 UR8, c[0x0][0x228]
    IADD3 R2, P0, R0, UR4, RZ
    IADD3.X R3, RZ, UR5, RZ, P0, !PT
.L_x_1:
    LDG.E.U8 R4, [R2.64]
    LDG.E R5, [UR6.64]
    IMAD.MOV.U32 R6, RZ, RZ, UR8
    IMAD.MOV.U32 R7, RZ, RZ, UR9
    IMAD.WIDE.U32 R6, R4, 0x4, R6
    LDG.E R8, [R6.64]
    FFMA R9, R8, R5, R9
    IADD3 R2, P0, R2, 0x20, RZ
    IMAD.X R3, RZ, RZ, R3, P0
    BRA `(.L_x_1)
"""


def test_lookups_are_decoding() -> None:
    decode = counted(LOOKUP, bits=8)
    assert roles(decode, "decode") == ["IMAD", "IMAD", "IMAD", "LDG"]
    assert roles(decode, "use") == ["FFMA"]
    assert decode.per_weight == 4.0


def _bodies(texts: Iterable[str]) -> list[int]:
    return [counted(text, bits=8 if text == LOOKUP else 4).total for text in texts]


def test_the_loop_is_the_innermost_that_multiplies() -> None:
    outer = PREFETCH.replace("UMOV UR12, 0x10", ".L_x_0:\n    UMOV UR12, 0x10").replace(
        "    EXIT", "    @P1 BRA `(.L_x_0)\n    EXIT"
    )
    assert len(parse(listing(outer)).loops) == 2
    assert _bodies([outer]) == _bodies([PREFETCH])

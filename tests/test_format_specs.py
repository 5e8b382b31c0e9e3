"""Spec strings: what names a format, what is refused, and that docs/formats.md knows them all."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from quantlib.errors import FormatError
from quantlib.formats import families, get_format, list_formats

from .cases import FORMATS


def canonical_specs() -> list[str]:
    specs = []
    for bits, size, kind, dtype in itertools.product(
        (2, 3, 4, 8), ("g8", "g32", "g64", "g128", "channel"), ("", "-asym", "-full"), ("", "-bf16", "-fp32")
    ):
        specs.append(f"int{bits}-{size}{kind}{dtype}")
    for name, size, dq in itertools.product(("nf4", "fp4"), ("", "-channel", "-g128", "-g32"), ("", "-dq")):
        specs.append(name + size + dq)
    for element, granularity in itertools.product(("e4m3", "e5m2"), ("", "-tensor", "-block128")):
        specs.append(f"fp8-{element}{granularity}")
    return [
        *specs,
        "nvfp4",
        "nvfp4-46",
        "mxfp4",
        "mxfp4-ceil",
        "mxfp8",
        "mxfp8-ceil",
        "mxfp8-e5m2",
        "mxfp8-e5m2-ceil",
        "q4_k",
        "q6_k",
    ]


@pytest.mark.parametrize("spec", [*canonical_specs(), *FORMATS])
def test_a_canonical_spec_string_is_the_name_of_its_format(spec: str) -> None:
    fmt = get_format(spec)
    assert fmt.name == str(fmt) == spec
    assert get_format(fmt.name) == fmt
    assert hash(get_format(fmt.name)) == hash(fmt)
    assert get_format(fmt) is fmt


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("int4", "int4-g128"),
        ("INT4-Asym-G64", "int4-g64-asym"),
        ("int8", "int8-channel"),
        ("int4-sym-fp16", "int4-g128"),
        ("nf4-g64", "nf4"),
        ("nf4-dq-g128", "nf4-g128-dq"),
        ("fp8", "fp8-e4m3"),
        ("fp8-block128", "fp8-e4m3-block128"),
        ("fp8-tensor-e5m2", "fp8-e5m2-tensor"),
        ("mxfp4-floor", "mxfp4"),
        ("mxfp8-ceil-e5m2", "mxfp8-e5m2-ceil"),
        (" nvfp4 ", "nvfp4"),
    ],
)
def test_other_spellings_give_the_canonical_format(spec: str, canonical: str) -> None:
    assert get_format(spec) == get_format(canonical)
    assert get_format(spec).name == canonical


@pytest.mark.parametrize(
    ("family", "keywords", "spec"),
    [
        ("int4", {"group_size": 64, "symmetric": False}, "int4-g64-asym"),
        ("int4", {"group_size": None, "scale_dtype": "bf16"}, "int4-channel-bf16"),
        ("int4", {"group_size": -1}, "int4-channel"),
        ("int3", {"group_size": 32, "full_range": True}, "int3-g32-full"),
        ("int4-g64", {"symmetric": False}, "int4-g64-asym"),
        ("int4-g64", {"group_size": 64}, "int4-g64"),
        ("nf4", {"double_quant": True, "group_size": 128}, "nf4-g128-dq"),
        ("fp8", {"element": "e5m2", "granularity": "tensor"}, "fp8-e5m2-tensor"),
        ("nvfp4", {"scale_rule": "46"}, "nvfp4-46"),
        ("mxfp8", {"element": "e5m2", "scale_rule": "ceil"}, "mxfp8-e5m2-ceil"),
    ],
)
def test_keywords_say_the_same_as_words(family: str, keywords: dict[str, object], spec: str) -> None:
    assert get_format(family, **keywords) == get_format(spec)


@pytest.mark.parametrize(
    ("spec", "keywords", "message"),
    [
        ("nvpf4", {}, r"unknown format 'nvpf4'; did you mean 'nvfp4'\? Known: int4, int8, .*q6_k"),
        ("q4k", {}, r"did you mean 'q4_k'"),
        ("", {}, r"unknown format ''"),
        ("int4-g64-asim", {}, r"unknown word 'asim' .* did you mean 'asym'\? int4 takes: g<N>, channel, sym, asym, full"),
        ("q4_k-g64", {}, r"unknown word 'g64' .*q4_k takes no options"),
        ("int4-g0", {}, r"group_size=0 can't be; expected a positive multiple of 8"),
        ("int4-g12", {}, r"group_size=12 can't be"),
        ("nf4", {"group_size": -64}, r"group_size=-64 can't be"),
        ("int4-g-1", {}, r"unknown word 'g' .*did you mean 'g<N>'"),
        ("int4", {"group_size": 64.0}, r"group_size=64.0 can't be"),
        ("int4", {"group_size": "64"}, r"group_size='64' can't be"),
        ("int4-g64-g128", {}, r"sets group_size twice"),
        ("int4-sym-asym", {}, r"sets symmetric twice"),
        ("int4-asym-full", {}, r"full_range belongs to symmetric grids"),
        ("int4-g64", {"group_size": 128}, r"disagree"),
        ("nvfp4", {"group_size": 16}, r"'nvfp4' does not take \['group_size'\]; it takes \['scale_rule'\]"),
        ("nvfp4", {"scale_rule": "7"}, r"scale_rule='7' is unknown"),
        ("mxfp4", {"scale_rule": "round"}, r"expected 'floor' or 'ceil'"),
        ("mxfp8", {"element": "e3m4"}, r"expected 'e4m3' or 'e5m2'"),
        ("fp8", {"granularity": "row"}, r"expected one of channel, tensor, block128"),
        ("int4", {"scale_dtype": "fp64"}, r"expected one of fp16, bf16, fp32"),
        ("q4_k", {"bits": 4}, r"it takes no keywords"),
    ],
)
def test_what_can_not_be_is_refused_with_the_known_and_the_nearest(
    spec: str, keywords: dict[str, object], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        get_format(spec, **keywords)


def test_a_format_takes_no_keywords_and_a_number_is_no_spec() -> None:
    with pytest.raises(FormatError, match="is a format already"):
        get_format(get_format("int4"), group_size=64)
    with pytest.raises(FormatError, match="found int"):
        get_format(4)  # type: ignore[arg-type]


def test_the_documented_table_holds_every_format_with_its_exact_bits() -> None:
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|.*?\| ([0-9.]+) \|$", text, flags=re.MULTILINE)
    for spec, bits in rows:
        assert get_format(spec).name == spec
        exact = get_format(spec).bits_per_weight(4096, 4096)
        assert f"{exact:.4f}".rstrip("0").rstrip(".") == bits, f"{spec}: {exact}"
    documented = {spec for spec, _ in rows}
    assert documented >= set(list_formats())
    for family in families():
        for word in family.words:
            assert f"`{word.shown}`" in text, f"{family.name} takes {word.shown}, which docs/formats.md does not explain"

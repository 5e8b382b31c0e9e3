"""tests/cases.py covers what is registered, so that nothing new goes untested."""

from __future__ import annotations

from quantlib.formats import families, get_format, list_formats

from . import cases


def test_cases_name_formats_canonically() -> None:
    assert [get_format(spec).name for spec in cases.FORMATS] == list(cases.FORMATS)


def test_every_family_and_default_format_is_covered() -> None:
    names = set(cases.FORMATS)
    uncovered = [name for name in list_formats() if name not in names]
    assert not uncovered, f"add a row to tests/cases.py for {uncovered}"
    for family in families():
        assert any(name == family.name or name.startswith(family.name + "-") for name in names), family.name


def test_every_codec_scale_and_zero_kind_is_covered() -> None:
    formats = [get_format(spec) for spec in cases.FORMATS]
    assert {fmt.codec.kind for fmt in formats} == {"affine", "table", "minifloat"}
    assert {fmt.scale.kind for fmt in formats} == {"float", "e4m3_global", "e8m0", "double", "super"}
    assert {fmt.zero for fmt in formats} == {"none", "integer", "minimum"}
    assert {(fmt.block.rows, fmt.block.cols) for fmt in formats} >= {(None, None), (1, None), (128, 128), (1, 16)}

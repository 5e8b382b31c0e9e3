"""Rows, targets, tables and pictures of the bench."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import report
from bench.plots import ratios, roofline, write_plots
from bench.protocol import Case
from bench.results import FIELDS, Row, latest, read_rows, to_json
from bench.session import PRESENCE
from bench.targets import TARGETS, evaluate
from tests.bench_rows import CASE, row

ROOT = Path(__file__).parents[1]


def test_a_row_survives_its_line() -> None:
    full = row(ratios={"marlin": 1.5}, error=1e-3, reason="why", extra_bytes=7)
    record = json.loads(to_json(full))
    assert set(record) <= set(FIELDS)
    assert {"device", "driver", "torch", "triton", "quantlib", "commit", "date", "operation", "n", "k", "m"} <= set(record)
    assert Row(**record) == full
    assert "do_bench_us" not in record


def test_the_latest_row_of_a_case_counts() -> None:
    old, new = row(us=5.0), row(us=7.0, date="2026-02-01T00:00:00+00:00")
    assert latest([new, old, row(replace(CASE, m=1))]) == [new, row(replace(CASE, m=1))]


def outcomes(*rows: Row) -> dict[str, tuple[float | None, str]]:
    return {outcome.target.name: (outcome.ratio, outcome.state) for outcome in evaluate(rows)}


def test_targets_are_not_measured_without_rows() -> None:
    assert set(outcomes().values()) == {(None, "not measured")}
    wide = Case("linear", "int4-g128", 28672, 4096, 1)
    on_another_card = row(wide, device="NVIDIA A100", gbps=2900.0)
    hidden = row(wide, us=None, gbps=None, reason="wrong: relative error 1 exceeds 0.008")
    not_taken = row(wide, taken=False, gbps=2900.0)
    for useless in (on_another_card, hidden, not_taken):
        assert set(outcomes(useless).values()) == {(None, "not measured")}


def test_targets_take_the_worst_case() -> None:
    wide, tall = Case("linear", "int4-g128", 28672, 4096, 1), Case("linear", "nf4", 8192, 28672, 16)
    name, marlin = "4-bit, M <= 16, wide and tall", "4-bit, M <= 16, against marlin"
    found = outcomes(row(wide, gbps=2700.0, ratios={"marlin": 1.2}), row(tall, gbps=2250.0, ratios={"marlin": 1.0}))
    assert found[name] == (pytest.approx(0.75), "met")
    assert found[marlin] == (1.0, "not met")  # as fast is not faster
    assert outcomes(row(wide, gbps=2000.0))[name] == (pytest.approx(2 / 3), "not met")


def test_the_best_peer_counts_and_a_copy_does_not() -> None:
    middle = Case("linear", "int4-g128", 8192, 8192, 64)
    found = outcomes(row(middle, ratios={"marlin": 1.4, "gemlite": 0.9, "torch_bf16": 0.5}))
    assert found["4-bit, M 64-256, against the best peer"] == (0.9, "not met")
    name = "4-bit dX, M 512-4096, against decoding first, without a 16-bit copy"
    backward = Case("dgrad", "nf4", 8192, 8192, 512)
    copying = row(backward, us=5.0, extra_bytes=2 * 8192 * 8192, ratios={"dequantize_cublas": 2.0})
    fused = row(backward, us=9.0, extra_bytes=1 << 20, ratios={"dequantize_cublas": 1.1}, taken=False)
    assert outcomes(copying)[name] == (None, "not measured")
    assert outcomes(copying, fused)[name] == (1.1, "met")


def test_the_report_shows_targets_cases_and_failures() -> None:
    wide = Case("linear", "int4-g128", 28672, 4096, 1)
    rows = [
        row(wide, gbps=2700.0, tflops=5.0, floor_measured=0.9, error=1e-3, ratios={"marlin": 1.2, "gemlite": 1.6}, host_us=4.0),
        row(wide, contestant="other", us=None, taken=False, reason="wrong: relative error 0.5 exceeds 0.008"),
        row(PRESENCE, contestant="marlin", us=None, taken=False, version="", reason="absent: gptqmodel is not installed"),
    ]
    text = report.document(rows)
    assert "| 4-bit, M <= 16, wide and tall | H100 | >= 0.70 of copy | 0.90 of copy | met |" in text
    assert (
        "| linear | `int4-g128` | 28672 x 4096 | 1 | kernel | 10.0 | 2700 | 5.0 | 90% | 4 | 1.0e-03 | marlin | 1.20 |" in text
    )
    assert "| linear | `int4-g128` | decode | 1 | 90% | 1.20 |" in text
    assert "- marlin: absent: gptqmodel is not installed" in text
    assert "- other, linear int4-g128 28672x4096 M=1: wrong: relative error 0.5 exceeds 0.008" in text
    assert "commit recording" in text
    empty = report.document([])
    assert empty.count("not measured") == len(TARGETS)
    assert "No run on a GPU has been recorded." in empty


def test_the_readme_block_is_replaced_between_its_markers() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.updated(text, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="needs one"):
        report.updated("no markers", "new")


def test_the_readme_shows_what_the_committed_rows_say() -> None:
    rows = latest(read_rows(sorted(report.RESULTS.glob("*.jsonl"))))
    readme = (ROOT / "README.md").read_text()
    assert report.updated(readme, report.readme_block(rows)) == readme, "run python -m bench.report --update"


def test_pictures_are_written_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    rows = [
        row(Case(operation, "nf4", 8192, 8192, m), tflops=10.0 * m, matmul_tflops=800.0, ratios={"torch_bf16": 0.5 + m / 20})
        for operation in ("linear", "dgrad")
        for m in (1, 16, 64)
    ]
    paths = write_plots(rows, tmp_path)
    assert [path.name for path in paths] == ["roofline.png", "ratios.png"]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_plots(rows, tmp_path)] == first
    assert all(picture.startswith(b"\x89PNG") for picture in first)
    assert write_plots([], tmp_path / "empty") == []
    assert roofline([]) is None
    assert ratios([row()]) is None

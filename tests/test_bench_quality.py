"""The table of calibrated quality: means, spread, shares; and text that is not what is scored."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import quality
from bench.quality import BEGIN, END, PAGE, Row
from quantlib.evaluation import default_text


def row(algorithm: str, perplexity: float, seed: int = 0, text: str = "", tuned: bool = False) -> Row:
    return Row("nvfp4", algorithm, text, tuned, seed, perplexity, 10.0, perplexity / 100, 0.75, "d1ce", 4.5, 60.0)


def test_rows_are_means_of_seeds_and_shares_of_what_rounding_loses() -> None:
    rows = [row("rtn", 20.0), *(row("gptq", perplexity, seed, "topics") for seed, perplexity in enumerate((12.0, 13.0, 14.0)))]
    lines = quality.table([*rows, row("gptq", 11.0, 0, "topics", tuned=True)])
    assert lines[2:] == [
        "| `nvfp4` | rtn | - | 1 | 20.000 | 0.2000 | 75.0% |  |",
        "| `nvfp4` | gptq | topics | 3 | 13.000 ± 1.000 | 0.1300 | 75.0% | 70% |",
        "| `nvfp4` | gptq + tune_scales | topics | 1 | 11.000 | 0.1100 | 75.0% | 90% |",
    ]


def test_rows_outlive_their_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.jsonl")
    assert quality.read_rows() == []
    rows = [row("rtn", 20.0), row("gptq", 12.0, 1, "topics")]
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in rows))
    assert quality.read_rows() == rows


def test_the_page_shows_the_rows() -> None:
    shown = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()
    assert shown == quality.table(quality.read_rows()), "run python -m bench.quality --update"


def test_the_other_corpus_is_long_and_another() -> None:
    text = quality.docstrings()
    assert len(text) > 500_000
    topics = default_text()
    pieces = [text[start : start + 200] for start in range(0, len(text), len(text) // 50)]
    assert sum(piece in topics for piece in pieces) == 0


def test_every_case_can_be_run() -> None:
    from quantlib.algorithms import get_algorithm
    from quantlib.formats import get_format

    assert len(set(quality.CASES)) == len(quality.CASES)
    for case in quality.CASES:
        needs = get_algorithm(case.algorithm).needs
        assert (needs != "nothing") == bool(case.text)
        assert get_format(case.spec).name == case.spec

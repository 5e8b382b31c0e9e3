"""What the documentation claims is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_support_matrix_is_the_kernels_own() -> None:
    run = subprocess.run([sys.executable, "-m", "bench.support_matrix"], capture_output=True, text=True, cwd=ROOT, check=True)
    readme = (ROOT / "README.md").read_text()
    found = readme.split("<!-- support matrix: begin -->")[1].split("<!-- support matrix: end -->")[0]
    assert found.strip() == run.stdout.strip(), "run python -m bench.support_matrix --update"


def test_links_between_pages_hold() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert len(pages) >= 6
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_named_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)\b", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named <= targets


def test_the_readme_quickstart_runs() -> None:
    import quantlib

    from .models import llama

    model = llama()
    report = quantlib.patch(model, {"re:.*mlp.*": "nvfp4", "*self_attn*": "int8"}, progress=False)
    assert {layer.format for layer in report.layers} == {"nvfp4", "int8-channel"}


def test_every_algorithm_is_listed_where_users_look() -> None:
    from quantlib.algorithms import list_algorithms
    from quantlib.cli.calibration import ALGORITHM_HELP

    pages = {name: (ROOT / "docs" / name).read_text() for name in ("calibration.md", "cli.md")}
    for name in list_algorithms():
        assert re.search(rf"(?<![\w+-]){re.escape(name)}(?![\w+-])", ALGORITHM_HELP), name
        for page, text in pages.items():
            assert f"`{name}`" in text, f"{page}: {name}"

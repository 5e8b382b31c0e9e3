"""The structure that docs/design.md lays down: who may know whom, and what the package shows."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import quantlib

ROOT = Path(__file__).parents[1]
LEVELS = {
    "errors": 0,
    "formats": 0,
    "layouts": 1,
    "tensor": 1,
    "experts": 1,
    "devices": 1,
    "testing": 1,
    "timing": 1,
    "presets": 1,
    "algorithms": 2,
    "checkpoints": 2,
    "kernels": 2,
    "dispatch": 3,
    "ops": 3,
    "grouped_dispatch": 3,
    "grouped_ops": 3,
    "nn": 4,
    "selection": 4,
    "report": 4,
    "running": 4,
    "patch": 5,
    "plan": 5,
    "explain": 5,
    "options": 5,
    "tuning": 5,
    "serialization": 5,
    "evaluation": 5,
    "calibration": 5,
    "integrations": 6,
    "cli": 6,
    "__main__": 6,
}
"""First name under quantlib -> level. A module knows its own package and what lies below it; level 3's ops know dispatch."""

SAME_LEVEL = {
    ("ops", "dispatch"),
    ("grouped_dispatch", "dispatch"),
    ("grouped_ops", "grouped_dispatch"),
    ("grouped_ops", "ops"),
    ("tensor", "layouts"),
    ("experts", "tensor"),
    ("layouts", "devices"),
    ("formats", "errors"),
    ("cli", "integrations"),
    ("calibration", "evaluation"),
    ("patch", "calibration"),
    ("plan", "calibration"),
    ("plan", "evaluation"),
    ("plan", "patch"),
}
SAME_LEVEL |= {("__main__", "cli")}

SOURCES = sorted((ROOT / "quantlib").rglob("*.py"))


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in the file, function bodies included, type-checking blocks left out."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append((node.lineno, f"{'.' * node.level}{node.module or ''}"))
            elif node.module == "quantlib":
                found += [(node.lineno, f"quantlib.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module or ""))
    return found


def upward(own: str, name: str) -> str | None:
    """Why a module under quantlib.<own> must not import `name`, or None where it may."""
    parts = name.split(".")
    if name.startswith("."):
        return "imports are absolute"
    if parts[0] != "quantlib":
        return None
    if len(parts) == 1:
        return "imports the package itself, which knows everything"
    other = parts[1]
    if other == own or other in ("triton_kernels", "_cpu", "_cuda", "tuned"):
        return None if other == own or own in ("kernels", "cli") else f"{other} is for kernels alone"
    if other not in LEVELS:
        return f"{other} has no level"
    below = LEVELS[other] < LEVELS[own] or (own, other) in SAME_LEVEL
    return None if below else f"level {LEVELS[own]} ({own}) knows level {LEVELS[other]} ({other})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_upward(path: Path) -> None:
    relative = path.relative_to(ROOT / "quantlib")
    own = relative.parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in LEVELS, f"{relative}: give it a level"
    allowed_package = {"quantlib"} if own == "cli" else set()
    wrong = [
        f"{relative}:{line}: {reason}"
        for line, name in imported(path)
        if name not in allowed_package and (reason := upward(own, name)) is not None
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rule_itself_finds_an_upward_import() -> None:
    assert upward("formats", "quantlib.kernels.base") is not None
    assert upward("kernels", "quantlib.algorithms") is not None
    assert upward("patch", "quantlib") is not None
    assert upward("kernels", "quantlib.formats.base") is None
    assert upward("formats", "torch") is None


@pytest.mark.parametrize("path", sorted((ROOT / "triton_kernels").glob("*.py")), ids=lambda path: path.name)
def test_triton_kernels_know_only_triton(path: Path) -> None:
    """Its own modules it imports relatively, so that it works under any name."""
    for line, name in imported(path):
        own = name.startswith(".") and not name.startswith("..")
        assert own or name.split(".")[0] in {"triton"} | sys.stdlib_module_names, f"{path.name}:{line}: {name}"


def test_every_level_exists_and_nothing_stands_outside() -> None:
    present = {path.relative_to(ROOT / "quantlib").parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"}
    assert present == set(LEVELS)


def test_public_names_are_importable_and_documented() -> None:
    for name in quantlib.__all__:
        assert getattr(quantlib, name).__doc__, f"quantlib.{name} has no docstring"


def test_import_touches_no_gpu_and_no_heavy_library() -> None:
    code = (
        "import sys, quantlib, torch;"
        "heavy = [m for m in ('transformers', 'matplotlib', 'jinja2', 'peft', 'accelerate', 'gguf') if m in sys.modules];"
        "assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

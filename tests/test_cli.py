"""The command line, run in process on tiny models that are written to disk by the test."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import quantlib
from quantlib.cli import app
from quantlib.cli import console as consoles
from quantlib.errors import QuantlibError
from quantlib.formats import list_formats
from quantlib.running import structural_copy
from tests.models import assert_untouched, llama, snapshot

VOCABULARY = 128


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Invoke the application; consoles are wide, so that no expected word is wrapped."""
    monkeypatch.setattr(consoles.out, "_width", 200)
    runner = CliRunner()

    def invoke(*arguments: object) -> SimpleNamespace:
        result = runner.invoke(app, [str(argument) for argument in arguments])
        return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr, exception=result.exception)

    return invoke


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, as transformers saves them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny"
    llama(vocab_size=VOCABULARY).save_pretrained(path)
    words = Tokenizer(models.WordLevel({chr(code): code for code in range(VOCABULARY)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="\0")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized by the command line."""
    path = tmp_path_factory.mktemp("models") / "tiny-nvfp4"
    result = CliRunner().invoke(app, ["quantize", str(saved), "--spec", "nvfp4", "--output", str(path)])
    assert result.exit_code == 0, result.output
    return path


def refused(result: SimpleNamespace, *words: str) -> None:
    """One message on stderr, nothing of a traceback, exit code 1."""
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: ") or "error: " in result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


def test_help_names_every_command(run) -> None:  # type: ignore[no-untyped-def]
    text = run("--help").out
    for command in ("demo", "quantize", "eval", "inspect", "doctor"):
        assert command in text
        assert run(command, "--help").code == 0


def test_the_module_runs_and_prints_its_version() -> None:
    done = subprocess.run([sys.executable, "-m", "quantlib", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"quantlib {quantlib.__version__}"


def test_the_application_imports_neither_transformers_nor_matplotlib() -> None:
    code = "import sys, quantlib.cli; print([m for m in ('transformers', 'matplotlib', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("spec", list_formats())
def test_inspect_describes_every_format(run, spec: str) -> None:  # type: ignore[no-untyped-def]
    result = run("inspect", spec, "--shape", "256x512")
    assert result.code == 0, result.err
    fmt = quantlib.get_format(spec)
    assert fmt.name in result.out
    assert f"{fmt.nbytes(256, 512):,}" in result.out
    for part in fmt.specs(256, 512):
        assert part in result.out
    assert "unit Gaussians" in result.out


def test_inspect_lists_a_checkpoint(run, checkpoint: Path) -> None:  # type: ignore[no-untyped-def]
    for target in (checkpoint, checkpoint / "quantlib.json"):
        result = run("inspect", target)
        assert result.code == 0, result.err
        assert "14 quantized layers" in result.out
        assert re.search(r"down_proj.*nvfp4.*64 x 160", result.out)


def test_inspect_lists_any_safetensors_file(run, saved: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    result = run("inspect", saved / "model.safetensors")
    assert result.code == 0, result.err
    assert "model.layers.1.mlp.up_proj.weight" in result.out
    assert "[160, 64]" in result.out
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 40)
    refused(run("inspect", broken), "no safetensors file")


def test_inspect_refuses_in_words(run, saved: Path) -> None:  # type: ignore[no-untyped-def]
    refused(run("inspect", "nvpf4"), "did you mean 'nvfp4'")
    refused(run("inspect", "nvfp4", "--shape", "12"), "NxK")
    refused(run("inspect", saved), "neither")


def test_doctor_names_versions_extensions_and_kernels(run) -> None:  # type: ignore[no-untyped-def]
    result = run("doctor", "--spec", "nf4", "--dtype", "float32")
    assert result.code == 0, result.err
    for expected in (torch.__version__, "quantlib._cpu", "quantlib._cuda", "every kernel for nf4", "reference_linear"):
        assert expected in result.out
    refused(run("doctor", "--spec", "nf5"), "unknown format")


def test_quantize_writes_what_load_reads(saved: Path, checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = quantlib.load(checkpoint)
    expected = AutoModelForCausalLM.from_pretrained(saved)
    quantlib.patch(expected, "nvfp4", progress=False)
    ids = torch.arange(24)[None]
    assert torch.equal(loaded(ids).logits, expected(ids).logits)
    assert AutoTokenizer.from_pretrained(checkpoint)("ab")["input_ids"] == [97, 98]


def test_quantize_takes_patterns(run, saved: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    target = tmp_path / "mixed"
    result = run("quantize", saved, "-s", "*.down_proj=int8", "-s", "*.q_proj=none", "-s", "*=nf4", "-o", target)
    assert result.code == 0, result.err
    layers = json.loads((target / "quantlib.json").read_text())["layers"]
    assert layers["model.layers.0.mlp.down_proj"]["format"] == "int8-channel"
    assert layers["model.layers.0.self_attn.k_proj"]["format"] == "nf4"
    assert "model.layers.0.self_attn.q_proj" not in layers


def test_quantize_refuses_before_it_loads(run, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from quantlib.cli import quantize

    def loaded(*_: object) -> None:
        raise AssertionError("loaded a model before refusing")

    monkeypatch.setattr(quantize, "load_model", loaded)
    target = tmp_path / "out"
    refused(run("quantize", saved, "-s", "nvpf4", "-o", target), "did you mean 'nvfp4'")
    refused(run("quantize", saved, "-s", "nf4", "-s", "int8", "-o", target), "PATTERN=FORMAT")
    refused(run("quantize", saved, "-s", "a=nf4", "-s", "a=int8", "-o", target), "twice")
    refused(run("quantize", saved, "-s", "nf4", "--algorithm", "gtpq", "-o", target), "unknown algorithm")
    refused(run("quantize", saved, "-s", "nf4", "--dtype", "int8", "-o", target), "--dtype")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("")
    refused(run("quantize", saved, "-s", "nf4", "-o", tmp_path / "used"), "is no quantlib checkpoint")
    assert not target.exists()


def test_quantize_calibrates_and_goes_on(run, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quantlib.calibration import journal

    text, target = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Pack my box with five dozen liquor jugs. " * 9)
    command = [
        "quantize",
        saved,
        "-s",
        "int4-g32",
        "--algorithm",
        "gptq",
        "--calibration",
        text,
        "--samples",
        8,
        "--length",
        24,
    ]
    command += ["--seed", 5, "-o", target]
    refused(run(*command, "--resume"), "there is no", "out.journal to go on with")
    real, written = journal.save_file, []

    def full(*arguments: object, **keywords: object) -> None:
        written.append(arguments)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        real(*arguments, **keywords)

    monkeypatch.setattr(journal, "save_file", full)
    refused(run(*command), "No space left on device")
    assert not target.exists()
    refused(run(*command), "holds what an interrupted run had done", "--resume")
    result = run(*command, "--resume")
    assert result.code == 0, result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]

    expected = AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokens = quantlib.calibration_tokens(text.read_text(), tokenizer, samples=8, length=24, seed=5)
    quantlib.patch(expected, "int4-g32", algorithm="gptq", calibration=tokens, progress=False)
    ids = torch.arange(24)[None]
    assert torch.equal(quantlib.load(target)(ids).logits, expected(ids).logits)


def test_quantize_takes_every_algorithm(run, saved: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from quantlib.algorithms import get_algorithm, list_algorithms

    for algorithm in list_algorithms():
        sample = [] if get_algorithm(algorithm).needs == "nothing" else ["--samples", 4, "--length", 24]
        target = tmp_path / algorithm
        result = run("quantize", saved, "-s", "int4-g32", "--algorithm", algorithm, *sample, "-o", target)
        assert result.code == 0, result.err
        assert f", {algorithm}," in result.out
        assert quantlib.load(target)(torch.arange(24)[None]).logits.isfinite().all()


def test_sample_text_is_refused_where_nothing_reads_it(run, saved: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    command = ["quantize", saved, "-s", "nf4", "-o", tmp_path / "out"]
    refused(run(*command, "--calibration", "c4"), "'rtn' takes no sample text")
    refused(run(*command, "--resume"), "there is no journal")
    refused(
        run(*command, "--algorithm", "gptq", "--calibration", tmp_path / "none.txt"), "no such file, and no data set's name"
    )
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    refused(run(*command, "--algorithm", "gptq", "--calibration", tmp_path / "image.png"), "can't be read as UTF-8 text")
    assert not (tmp_path / "out").exists()


def test_eval_keeps_calibration_and_evaluation_apart(run, saved: Path) -> None:  # type: ignore[no-untyped-def]
    from quantlib.evaluation import default_text, make_windows

    arguments = ["eval", saved, "--spec", "nf4", "--window", 64, "--windows", 2, "--json"]
    calibrated = ["--algorithm", "gptq", "--samples", 4, "--length", 24]
    plain, gptq = (json.loads(run(*arguments, *more).out) for more in ([], calibrated))
    names = [name for name in gptq if "gptq" in name]
    assert len(names) == 1
    assert "nf4" in names[0]
    text = [ord(letter) % VOCABULARY for letter in default_text("evaluation")]
    assert gptq[names[0]]["digest"] == make_windows(text, window=64, windows=2).digest == next(iter(plain.values()))["digest"]
    too_many = run("eval", saved, "--spec", "nf4", "--window", 64, "--windows", len(text) // 64 + 1, *calibrated)
    refused(too_many, "tokens are too few")


def test_a_refused_layer_leaves_nothing_on_disk(run, saved: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused(run("quantize", saved, "-s", "*.nothing=nf4", "-o", tmp_path / "out"), "*.nothing", "matches none")
    refused(run("quantize", tmp_path / "absent", "-s", "nf4", "-o", tmp_path / "out"), "can't be loaded")
    assert list(tmp_path.iterdir()) == []


def test_eval_prints_json_that_equals_the_api(run, saved: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes a dull language model. " * 20)
    options = ("--text", text, "--window", 64, "--windows", 3, "--protocol", "B", "--json")
    result = run("eval", saved, "--spec", "int4-g32", *options)
    assert result.code == 0, result.err
    original, quantized = json.loads(result.out).values()
    model = AutoModelForCausalLM.from_pretrained(saved)
    direct = quantlib.evaluate(
        model, text.read_text(), AutoTokenizer.from_pretrained(saved), protocol="B", window=64, windows=3, progress=False
    )
    assert original["perplexity"] == pytest.approx(direct.perplexity, rel=1e-6)
    assert (original["protocol"], original["tokens"], original["digest"]) == ("B", 3 * 31, direct.digest)
    assert quantized["divergence"]["kl"] > 0
    assert quantized["divergence"]["reference_perplexity"] == pytest.approx(direct.perplexity, rel=1e-6)


def test_eval_compares_a_checkpoint_with_its_original(run, saved: Path, checkpoint: Path) -> None:  # type: ignore[no-untyped-def]
    result = run("eval", checkpoint, "--reference", saved, "--window", 32, "--windows", 2)
    assert result.code == 0, result.err
    assert "protocol A, 2 windows of 32, 62 tokens scored" in result.out
    assert "same top token" in result.out


def test_eval_refuses_in_words(run, saved: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused(run("eval", saved, "--protocol", "C"), "unknown protocol")
    refused(run("eval", saved, "--spec", "nf4", "--reference", saved), "--reference")
    refused(run("eval", saved, "--text", tmp_path / "absent.txt"), "can't be read")
    refused(run("eval", saved, "--window", 1_000_000), "too few")


def test_a_structural_copy_shares_every_tensor_and_can_be_patched_alone() -> None:
    model = llama()
    before = snapshot(model)
    copy = structural_copy(model)
    pairs = list(zip(model.parameters(), copy.parameters(), strict=True))
    assert all(mine is theirs for mine, theirs in pairs)
    quantlib.patch(copy, "nf4", progress=False)
    assert_untouched(model, before)
    assert not any(isinstance(module, quantlib.QuantLinear) for module in model.modules())


@pytest.fixture
def small_demo(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with the tiny model in place of the real one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quantlib.integrations import demo_model

    def load() -> tuple[object, object]:
        return AutoModelForCausalLM.from_pretrained(saved).eval(), AutoTokenizer.from_pretrained(saved)

    monkeypatch.setattr(demo_model, "load_demo_model", load)


def test_the_demo_prints_a_table_and_writes_a_report(run, small_demo: None, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = ("--windows", 2, "--tokens", 4, "--output", tmp_path / "out")
    result = run("demo", "--formats", "nvfp4, int4-g32", *options)
    assert result.code == 0, result.err
    assert re.search(r"^ float32 +32\.000", result.out, re.M)
    assert re.search(r"^ nvfp4 +4\.", result.out, re.M)
    assert "grid" in result.out
    assert str(tmp_path / "out" / "report.html") in result.out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [variant["name"] for variant in results["variants"]] == ["nvfp4", "int4-g32"]
    assert len(results["variants"][0]["layer_errors"]) == 14
    assert results["original"]["evaluation"]["tokens"] == 2 * 511


def test_compare_measures_every_method(run, saved: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = ["--window", 32, "--windows", 2, "--tokens", 3, "--samples", 4, "--length", 16, "--prompt", "ab"]
    result = run("compare", saved, "--methods", "bf16,nvfp4,gptq,nvfp4:gptq,nvfp4:rtn", "-o", tmp_path / "out", *options)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [variant["name"] for variant in found["variants"]]
    assert names == ["bf16", "nvfp4", "int4-g32:gptq", "nvfp4:gptq", "nvfp4:rtn"]
    assert all(name in result.out for name in names)
    by_name = {variant["name"]: variant for variant in found["variants"]}
    assert by_name["bf16"]["bits_per_weight"] == 16
    assert by_name["bf16"]["nbytes"] == found["original"]["nbytes"] // 2
    assert by_name["nvfp4"]["output_errors"] == {}
    errors = by_name["nvfp4:gptq"]["output_errors"]
    assert set(errors) == set(by_name["nvfp4"]["layer_errors"])
    assert all(0 < error < 1 for error in errors.values())
    assert by_name["nvfp4"]["evaluation"]["perplexity"] == by_name["nvfp4:rtn"]["evaluation"]["perplexity"]
    assert (tmp_path / "out" / "report.html").is_file()
    refused(run("compare", saved, "--methods", "nvpf4", "-o", tmp_path / "no"), "'nvpf4' is no dtype and no algorithm", "nvfp4")
    refused(run("compare", saved, "--methods", "nf4:gtpq", "-o", tmp_path / "no"), "did you mean 'gptq'")
    refused(run("compare", saved, "--methods", " , ", "-o", tmp_path / "no"), "no method is named")
    assert not (tmp_path / "no").exists()


def test_a_plan_is_made_and_taken(run, saved: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    made = tmp_path / "plan.json"
    sample = ["--samples", 10, "--length", 16, "--judged", 2]
    result = run("plan", saved, "-b", "5bpw", "-o", made, "--formats", "int2-g32-asym,int4-g32,int8-g32", *sample)
    assert result.code == 0, result.err
    assert (tmp_path / "plan.png").is_file()
    result = run("quantize", saved, "-s", made, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    layers = json.loads((tmp_path / "out" / "quantlib.json").read_text())["layers"]
    assert {name: entry["format"] for name, entry in layers.items()} == json.loads(made.read_text())["formats"]
    refused(run("plan", saved, "-b", "huge", "-o", made, *sample), "budget 'huge' can't be read")
    refused(run("plan", saved, "-b", "4bpw", "--formats", ",", "-o", made), "--formats names no format")


def test_an_interrupted_demo_leaves_no_rubbish_and_runs_again(
    run,
    small_demo: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    import quantlib.evaluation

    options = ("demo", "--formats", "nf4", "--windows", 1, "--tokens", 2, "--output", tmp_path)
    with monkeypatch.context() as broken:

        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        broken.setattr(quantlib.evaluation, "evaluate", interrupted)
        assert run(*options).code != 0
    assert list(tmp_path.iterdir()) == []
    assert run(*options).code == 0
    assert (tmp_path / "report.html").is_file()


def test_the_demo_refuses_before_it_loads(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from quantlib.integrations import demo_model

    def loaded() -> None:
        raise QuantlibError("loaded a model before refusing")

    monkeypatch.setattr(demo_model, "load_demo_model", loaded)
    refused(run("demo", "--formats", "nf4,nvpf4", "--output", tmp_path), "did you mean 'nvfp4'")
    refused(run("demo", "--formats", " , ", "--output", tmp_path), "names no format")
    (tmp_path / "file").write_text("")
    refused(run("demo", "--output", tmp_path / "file"), "can't be written")


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((Path(__file__).parents[1] / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_the_examples_run(example: Path) -> None:
    arguments = {"compare_formats": ["int4-g64-full"]}.get(example.stem, [])
    done = subprocess.run([sys.executable, example, *arguments], capture_output=True, text=True, cwd=example.parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

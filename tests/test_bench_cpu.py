"""The CPU benchmark without its clock: who takes part, what is counted, the GGUF export, tables, peers that are missing.

Nothing measures time. llama.cpp is not needed; where it is installed its own reading of the export is tested too.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from bench import cpu, cpu_layers, cpu_report, llama_cpp
from bench.clock import RecordedClock, SettledClock
from bench.cpu_layers import READ, Contest, Entrant, Ours, entrants, plan
from bench.cpu_model import KINDS, LLAMA, VARIANTS, Conversation, Variant, prepare
from bench.cpu_settings import describe_settings, reader
from bench.data import Material
from bench.gguf_export import permuted, read_nbytes, read_types, tensors, why_not, write_gguf
from bench.peers.torch_fp32 import TorchFp32
from bench.plots import cpu_picture
from bench.protocol import Case
from bench.report import RESULTS, updated
from bench.results import Row, read_rows, to_json
from quantlib import dispatch
from quantlib.errors import CheckpointError
from quantlib.formats import families, get_format
from quantlib.timing import Calls, NoTiming, Timing
from tests.models import llama

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class Counting:
    """A clock that calls everyone once and says that it took a microsecond."""

    name = "counting"

    def time(self, label: str, contestants: Mapping[str, Calls]) -> dict[str, Timing | NoTiming]:
        for calls in contestants.values():
            calls[-1]()
        return {name: Timing(1.0, 1.0, 1.0, 1, self.name) for name in contestants}


@pytest.fixture
def no_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-cpp-python is not installed."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)
    monkeypatch.setattr(llama_cpp, "library", llama_cpp.library.__wrapped__)


# who takes part, and in what


def test_everyone_has_a_format_that_the_gate_can_compare_with() -> None:
    everyone = entrants()
    assert len({entrant.name for entrant in everyone}) == len(everyone)
    for entrant in everyone:
        get_format(entrant.judged_as)
    peers = {entrant.name for entrant in everyone if entrant.contestant.backend == "peer"}
    assert {
        "torch_bf16",
        "torch_fp32",
        "torch_int4",
        "bitsandbytes",
        "ggml q4_0",
        "ggml q4_1",
        "ggml q4_k",
        "ggml q8_0",
    } == peers
    assert {peer for several in cpu_report.COUNTERPARTS.values() for peer in several} <= peers
    assert set(cpu_report.COUNTERPARTS) == set(cpu_layers.FORMATS)


def test_every_family_takes_part_but_those_that_are_like_another() -> None:
    known = {get_format(spec).name for spec in cpu_layers.FORMATS}
    left_out = {family.build().name for family in families()} - known
    gguf = {"q2_k", "q3_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"}  # q4_k stands for all
    assert left_out == {"int3-g128", "int2-g64", "fp4", "mxfp8"} | gguf


def test_a_plan_groups_cases_by_weight() -> None:
    groups = plan([(64, 32), (32, 64)], (1, 8), (8,))
    assert [[case.label for case in group] for group in groups] == [
        ["linear  64x32 M=1", "linear  64x32 M=8"],
        ["dgrad  64x32 M=8"],
        ["linear  32x64 M=1", "linear  32x64 M=8"],
        ["dgrad  32x64 M=8"],
    ]
    assert plan([(64, 32)], (), ()) == []
    full = plan([cpu_layers.SHAPE], cpu_layers.MS, cpu_layers.DGRAD_MS)
    assert [case.m for case in full[0]] == [1, 2, 4, 8, 16, 64, 512]
    assert [case.m for case in full[1]] == [64, 512]


def test_variants_of_the_model_differ_and_name_their_counterparts() -> None:
    names = [variant.name for variant in VARIANTS]
    assert len(set(names)) == len(names)
    assert set(cpu_report.SPOKEN.values()) | {"q4_0"} == set(KINDS) == set(llama_cpp.FILE_TYPES)
    assert set(cpu_report.SPOKEN) <= {variant.spec for variant in VARIANTS}
    assert cpu.chosen_variants(None) == list(VARIANTS)
    assert [variant.spec for variant in cpu.chosen_variants(["torch bf16", "quantlib nvfp4"])] == [None, "nvfp4", "nvfp4"]
    assert [variant.activations for variant in cpu.chosen_variants(["quantlib nvfp4"])] == [None, "int8"]


# the contest


@pytest.mark.parametrize("operation", ["linear", "dgrad"])
def test_a_contest_judges_times_and_counts_bytes(operation: str, no_llama: None) -> None:
    case = Case(operation, "", 64, 256, 5)
    said: list[str] = []
    contest = Contest(Counting(), entrants(("int4-g128", "q4_k")), said.append, cold_bytes=0, read_bytes=4000)
    ((entries, read),) = contest.run([case])
    found = {entry.entrant.name: entry for entry in entries}
    assert read == pytest.approx(4.0)
    for name, spec in (("quantlib int4-g128", "int4-g128"), ("quantlib q4_k", "q4_k")):
        assert isinstance(found[name].timing, Timing)
        assert found[name].nbytes == get_format(spec).nbytes(64, 256)
        assert found[name].case == replace(case, format=spec)
        assert found[name].layout == dispatch.best_layout(get_format(spec), (64, 256), CPU, torch.bfloat16)
        verdict = found[name].verdict
        assert verdict is not None
        assert verdict.error <= verdict.limit
    assert found["torch_bf16"].nbytes == 64 * 256 * 2
    assert found["torch_fp32"].nbytes == 64 * 256 * 4
    assert isinstance(found["torch_fp32"].timing, Timing)
    missing = found["ggml q4_0"].timing
    assert isinstance(missing, NoTiming)
    assert missing.reason.startswith("not installed: ")
    assert "pip install llama-cpp-python" in missing.reason
    int4 = found["torch_int4"].timing
    assert isinstance(int4, Timing) == (operation == "linear")
    if operation == "linear":
        assert found["torch_int4"].nbytes == 64 * 256 // 2 + 64 * 2 * 2 * 2
    assert not any("ggml" in line for line in said)


def test_everyone_multiplies_the_same_weight_and_the_same_x() -> None:
    base = Material(Case("linear", "", 32, 64, 0), CPU)
    other = base.in_format("nf4")
    assert other.weight is base.weight
    assert other.quantized.format.name == "nf4"
    case = Case("linear", "", 32, 64, 3)
    assert torch.equal(Material(case, CPU, seed=1).inputs(case), Material(case, CPU, seed=1).inputs(case))


def test_a_wrong_result_has_no_time() -> None:
    class Wrong(TorchFp32):
        def prepare(self, material: Material) -> Any:
            prepared = super().prepare(material)
            return replace(prepared, call=lambda weight, x: prepared.call(weight, x) * 1.1)

    everyone = [Entrant(Wrong(), "fp32", "nf4"), Entrant(Ours("nf4"), "nf4", "nf4")]
    ((entries, _),) = Contest(Counting(), everyone, lambda line: None, 0, 400).run([Case("linear", "", 32, 64, 3)])
    assert isinstance(entries[0].timing, NoTiming)
    assert entries[0].timing.reason.startswith("wrong: ")
    assert isinstance(entries[1].timing, Timing)


def test_reading_takes_its_turn() -> None:
    clock = RecordedClock({"linear  32x64 M=3": {READ: [2.0], "quantlib nf4": "cut off"}})
    ((entries, read),) = Contest(clock, [Entrant(Ours("nf4"), "nf4", "nf4")], print, 0, 4000).run(
        [Case("linear", "", 32, 64, 3)]
    )
    assert read == pytest.approx(2.0)
    assert entries[0].timing == NoTiming("cut off")
    assert reader(4096)() == 1024.0


def test_a_settled_clock_runs_everyone_once_before_each_sample() -> None:
    seen: list[str] = []
    SettledClock(repeats=2, sample_us=0.0).time("x", {"a": [lambda: seen.append("a")], "b": [lambda: seen.append("b")]})
    assert seen == ["a"] * 3 + ["b"] * 3 + ["b"] * 2 + ["a"] * 2


# the export


def rotated(weight: Tensor, x: Tensor, angle: Tensor, halves: bool) -> Tensor:
    """One head's W x, rotated in pairs of rows: (i, i + size/2) as in HuggingFace, or (2i, 2i + 1) as in llama.cpp."""
    rows = weight @ x
    pairs = rows.view(2, -1) if halves else rows.view(-1, 2).T
    first, second = pairs * angle.cos() + torch.stack([-pairs[1], pairs[0]]) * angle.sin()
    return torch.stack([first, second], dim=1)


def test_permuted_rows_rotate_as_the_originals_do() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3 * 8, 5, generator=generator), torch.randn(5, generator=generator)
    angle = torch.rand(4, generator=generator)
    moved = permuted(weight, 3)
    for head in range(3):
        rows = slice(8 * head, 8 * head + 8)
        assert torch.equal(rotated(weight[rows], x, angle, True), rotated(moved[rows], x, angle, False))


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_reads_back(tied: bool, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package `gguf` is not installed (pip install quantlib-kernels[gguf])")
    model, path = llama(tied=tied), tmp_path / "model.gguf"
    write_gguf(model, path)
    found = gguf.GGUFReader(path)
    config = model.config
    keys = {name: field.contents() for name, field in found.fields.items()}
    assert keys["general.architecture"] == "llama"
    assert keys["llama.block_count"] == config.num_hidden_layers
    assert keys["llama.embedding_length"] == config.hidden_size
    assert keys["llama.attention.head_count_kv"] == config.num_key_value_heads
    assert keys["llama.rope.freq_base"] == pytest.approx(config.rope_parameters["rope_theta"])
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert keys["llama.vocab_size"] == config.vocab_size
    read = {tensor.name: torch.from_numpy(numpy.array(tensor.data)) for tensor in found.tensors}
    written = dict(tensors(model))
    assert set(read) == set(written)
    assert ("output.weight" in read) == (not tied)
    for name, tensor in written.items():
        assert torch.equal(read[name], tensor), name
    key = model.model.layers[0].self_attn.k_proj.weight
    assert torch.equal(read["blk.0.attn_k.weight"], permuted(key, config.num_key_value_heads))
    assert torch.equal(read["blk.0.attn_v.weight"], model.model.layers[0].self_attn.v_proj.weight)
    assert read_nbytes(path) == sum(tensor.nbytes for tensor in written.values())
    assert read_types(path) == {"f32": 7 * config.num_hidden_layers + 1 + (not tied)}


def test_models_that_llama_cpp_would_read_otherwise_are_refused(tmp_path: Path) -> None:
    model = llama()
    for field, value in (("model_type", "qwen2"), ("attention_bias", True), ("rope_parameters", {"rope_type": "yarn"})):
        config = deepcopy(model.config)
        setattr(config, field, value)
        assert why_not(config) is not None
    assert why_not(model.config) is None
    model.config.mlp_bias = True
    with pytest.raises(CheckpointError, match="without biases"):
        write_gguf(model, tmp_path / "x.gguf")


# the model


def speaking_llama() -> nn.Module:
    """A model of 64 columns whose generation goes on."""
    model: nn.Module = llama()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def test_preparing_a_variant_leaves_the_original() -> None:
    model = speaking_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for variant in (Variant(None), Variant("nf4", "int8-channel"), Variant("nf4", dtype=torch.float32, decoder=True)):
        speaker = prepare(model, variant)
        assert speaker.nbytes > 0
        dtypes = {tensor.dtype for tensor in speaker.model.parameters() if tensor.is_floating_point()}
        assert dtypes == {variant.dtype}
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_conversation_asks_everyone_in_turns() -> None:
    model = speaking_llama()
    talk = Conversation.random(model.config.vocab_size, prompt=3, new_tokens=4, long_prompt=6, rounds=2)
    speakers = {variant.name: prepare(model, variant) for variant in (Variant(None, dtype=torch.float32), Variant("nf4"))}
    with torch.inference_mode():
        assert len(speakers["torch fp32"].generate(talk.prompt, 4)) == 4
        original = speakers["torch fp32"].prefill(talk.long_prompt)
        found, reads = talk.hold(speakers, original, lambda: None)
    assert [(each.operation, each.name, each.tokens) for each in found] == [
        (operation, name, tokens) for operation, tokens in (("generate", 4), ("prefill", 6)) for name in speakers
    ]
    assert [timing.samples for timing in reads] == [2, 2]
    assert found[0].error == 0.0
    assert found[1].error is not None
    assert 0 < found[1].error < 1


def test_llama_cpp_reads_the_export(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (docs/benchmarks.md)")
    from bench.cpu_model import llama_speakers

    model = llama(hidden_size=256, intermediate_size=512)
    ids = torch.arange(12) % model.config.vocab_size
    with torch.inference_mode(), llama_speakers(model, KINDS, ids, 32, lambda line: None) as speakers:
        assert set(speakers) == {LLAMA + kind for kind in KINDS}
        for speaker in speakers.values():
            assert len(speaker.generate(ids, 5)) == 5
            assert torch.isfinite(speaker.prefill(ids)).all()


# whole runs, and what is made of them


def run_tiny(tmp_path: Path, *options: str) -> list[Row]:
    path = tmp_path / "cpu-test.jsonl"
    words = ["--threads", str(torch.get_num_threads()), "--rounds", "1", "--read-mb", "1", "--out", str(path), *options]
    assert cpu.main(words, load=speaking_llama) == 0
    return read_rows([path])


@pytest.fixture
def kept_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of the benchmark in this process moves it to no other CPUs."""
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cpus: None, raising=False)


def test_a_run_writes_rows_that_the_tables_read(tmp_path: Path, no_llama: None, kept_affinity: None) -> None:
    options = ["--formats", "int4-g128,q4_k", "--shapes", "64x256", "--m", "1,3", "--dgrad-m", "3"]
    options += ["--new-tokens", "3", "--prefill", "8", "--variants", "torch bf16", "quantlib nvfp4", "quantlib q4_k"]
    rows = run_tiny(tmp_path, *options)
    assert {row.operation for row in rows} == {"linear", "dgrad", "generate", "prefill"}
    assert all(row.settings["threads"] == str(torch.get_num_threads()) for row in rows)
    assert {"chip", "isa", "threads"} <= set(describe_settings())
    ours = [row for row in rows if row.operation == "linear" and row.ours]
    names = ("int4-g128", "q4_k", "q4_k, x in int8")
    assert [(row.numbers, row.m) for row in ours] == [(name, m) for m in (1, 3) for name in names]
    for row in ours:
        assert (row.limit == 0.05) == (row.activations == "int8")
        assert row.taken
        assert row.us is not None
        assert row.ratios["torch_bf16"] > 0
        assert cpu_report.share_of_reading(row) == pytest.approx(row.nbytes / row.us / 1e3 / row.read_gbps)  # type: ignore[operator]
    spoken = [row for row in rows if row.operation == "generate" and row.ours]
    assert all(set(row.ratios) == {"torch bf16"} for row in spoken)
    text = cpu_report.document(rows)
    assert "| 64 x 256 | `q4_k` | torch | " in text
    assert "| 64 x 256 | `q4_k, x in int8` | torch | " in text
    assert "not installed: CMAKE_ARGS" in text
    assert text.count("llama.cpp q4_0: not installed") == 1
    assert cpu_report.latest_machine([*rows, layer("nf4", 1, ratios={"torch_bf16": 2.0})]) == cpu_report.latest_run(rows)
    picture = cpu_picture(cpu_report.latest_machine(rows))
    assert picture is not None
    assert picture.startswith(b"\x89PNG")


def recorded_row(**fields: Any) -> Row:
    basis: dict[str, Any] = {"device": "Chip", "arch": "avx2", "driver": "", "torch": "2.13", "triton": "", "quantlib": "0.1.0"}
    basis |= {"commit": "abc", "date": "2026-01-01", "activations": None, "backend": "cpu", "version": "0.1.0", "us": 10.0}
    basis |= {"settings": {"chip": "Chip", "isa": "avx2", "threads": "2"}}
    return Row(**basis | fields)


def layer(fmt: str, m: int, **fields: Any) -> Row:
    return recorded_row(operation="linear", format=fmt, n=1000, k=1000, m=m, contestant="cpu_linear", **fields)


def spoken(name: str, fmt: str, operation: str, **fields: Any) -> Row:
    return recorded_row(operation=operation, format=fmt, n=0, k=0, m=128, contestant=name, **fields)


def test_tables_hold_ratios_and_no_times() -> None:
    rows = [
        layer("nvfp4", 1, nbytes=562500, read_gbps=75.0, ratios={"ggml q4_0": 1.5, "torch_bf16": 3.25, "torch_fp32": 3.5}),
        layer("nvfp4", 8, ratios={"ggml q4_0": 0.75}),
        replace(layer("q4_0", 1, nbytes=562500, read_gbps=112.5), backend="peer", contestant="ggml q4_0", version="0.3.36"),
        spoken(
            "quantlib q4_k, x bf16",
            "q4_k",
            "generate",
            ratios={"llama.cpp q4_k": 0.5, "torch bf16": 4.0, "torch fp32": 2.0},
            error=0.125,
        ),
        spoken("quantlib q4_k, x bf16", "q4_k", "prefill", ratios={"llama.cpp q4_k": 1.25, "llama.cpp q4_0": 9.0}),
        spoken("llama.cpp q4_k", "3 q5_0, 1 q4_k", "prefill", error=0.25, backend="peer"),
        spoken("llama.cpp q8_0", "", "generate", us=None, reason="not installed: pip install it", backend="peer"),
    ]
    assert cpu_report.layers_table(rows).splitlines()[2:] == [
        "| 1000 x 1000 | `nvfp4` | ggml q4_0 | 1.50 | 0.75 |",
        "| 1000 x 1000 | `nvfp4` | torch | 3.25 |  |",
    ]
    assert cpu_report.bandwidth_table(rows).splitlines()[2:] == [
        "| 1000 x 1000 | quantlib `nvfp4` | 4.50 | 0.75 |",
        "| 1000 x 1000 | ggml q4_0 | 4.50 | 0.50 |",
    ]
    assert cpu_report.model_table(rows).splitlines()[2:] == [
        "| q4_k, x bf16 | llama.cpp q4_k | 0.50 | 1.25 | 2.00 |  | 0.125 |"
    ]
    assert cpu_report.peers_list(rows).splitlines() == [
        "- llama.cpp q4_k: 3 q5_0, 1 q4_k; error of logits 0.250",
        "- llama.cpp q8_0: not installed: pip install it",
    ]
    assert cpu_report.provenance(rows).startswith("Chip, avx2, 2 threads, torch 2.13, llama-cpp-python 0.3.36")
    assert cpu_report.readme_block([]) == cpu_report.NOTHING
    assert cpu_picture(rows[:1]) is None


def test_the_newest_run_of_each_case_and_machine_counts() -> None:
    old, new = layer("nf4", 1), layer("nf4", 1, date="2026-02-01")
    elsewhere = replace(old, device="Other")
    assert cpu_report.latest_run([old, new, elsewhere, layer("nf4", 2)]) == [new, elsewhere, layer("nf4", 2)]
    assert cpu_report.latest_run([replace(old, settings={})]) == []


def test_the_readme_shows_what_the_committed_cpu_rows_say() -> None:
    rows = read_rows(sorted(RESULTS.glob("cpu-*.jsonl")))
    readme = (ROOT / "README.md").read_text()
    expected = updated(readme, cpu_report.readme_block(rows), cpu_report.BEGIN, cpu_report.END)
    assert expected == readme, "run python -m bench.cpu_report --update"


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu-x.jsonl"
    rows = [
        layer("nvfp4", 1, ratios={"torch_bf16": 2.0}),
        replace(layer("bf16", 1), backend="peer", contestant="torch_bf16"),
        spoken("torch bf16", "", "generate", backend="peer"),
        spoken("quantlib nvfp4", "nvfp4", "generate", ratios={"torch bf16": 1.0}),
    ]
    path.write_text("".join(to_json(row) + "\n" for row in rows))
    assert cpu_report.main([str(path), "--images", str(tmp_path / "images")]) == 0
    assert "| 1000 x 1000 | `nvfp4` | torch | 2.00 |" in capsys.readouterr().out
    assert (tmp_path / "images" / "cpu.png").read_bytes().startswith(b"\x89PNG")

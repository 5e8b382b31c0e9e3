"""Patching a model of a billion parameters needs little more memory than the model; calibrating, what a block's layers read."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

COMMON = """
import json, sys, time
from pathlib import Path
import torch, transformers, quantlib

def status(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) * 1024

torch.set_num_threads(2)
"""

PATCHING = """
config = transformers.LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                                  num_key_value_heads=8, vocab_size=32000)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
model.to_empty(device="cpu")
for parameter in model.parameters():
    parameter.data.normal_(0, 0.02)
size = sum(p.numel() * p.element_size() for p in model.parameters())
quantlib.patch(torch.nn.Sequential(torch.nn.Linear(64, 64)), sys.argv[1], progress=False)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
started = time.perf_counter()
report = quantlib.patch(model, sys.argv[1])
seconds = time.perf_counter() - started
peak, after = status("VmHWM"), status("VmRSS")
weights = sum(p.numel() for p in model.parameters()) + sum(l.shape[0] * l.shape[1] for l in report.layers)
print(json.dumps({"size": size, "extra": peak - before, "freed": before - after, "seconds": seconds, "weights": weights,
                  "bits": report.bits_per_weight, "saved": report.original_nbytes - report.nbytes}))
"""

CALIBRATING = """
config = transformers.LlamaConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
                                  num_key_value_heads=4, vocab_size=1000)
model = transformers.LlamaForCausalLM(config)
tokens = torch.randint(1000, (128, 512))
quantlib.patch(torch.nn.Sequential(torch.nn.Linear(64, 64)), "int4-g64", progress=False)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
quantlib.patch(model, "int4-g64", algorithm="rtn-importance", calibration=tokens, progress=False)
kept = tokens.numel() * 4 * (256 + 256 + 1024)  # the block's hidden states, what o_proj reads and what down_proj reads
print(json.dumps({"kept": kept, "extra": status("VmHWM") - before, "after": status("VmRSS") - before}))
"""


def run(program: str, *arguments: str) -> tuple[str, dict[str, float]]:
    """What a process of its own printed, and the last line of it, JSON."""
    command = [sys.executable, "-c", COMMON + program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["nvfp4", "nf4"])
def test_a_billion_parameters_patch_within_300_mb_over_the_model(spec: str) -> None:
    started = time.perf_counter()
    printed, found = run(PATCHING, spec)
    print(f"{spec}: {found}, {time.perf_counter() - started:.0f} s in all")
    assert found["weights"] > 1.0e9
    assert found["extra"] <= 300e6
    assert found["freed"] >= found["saved"] - 300e6
    assert "112/112" in printed


@pytest.mark.slow
def test_calibrating_needs_what_one_block_reads_and_leaves_nothing() -> None:
    _, found = run(CALIBRATING)
    print(found)
    assert found["kept"] > 400e6
    assert found["extra"] <= found["kept"] + 150e6
    assert found["after"] <= 50e6

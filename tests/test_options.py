"""Options under the names that GPTQ's and AWQ's packages gave them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import quantlib
from quantlib.algorithms import AWQ, GPTQ
from quantlib.options import from_options


@pytest.mark.parametrize(
    ("options", "spec", "algorithm"),
    [
        ({}, "int4-g128", GPTQ()),
        ({"bits": 3, "group_size": 32, "desc_act": False, "damp_percent": 0.05}, "int3-g32", GPTQ(0.05, desc_act=False)),
        ({"bits": 4, "group_size": -1, "sym": False, "static_groups": True}, "int4-channel-asym", GPTQ(static_groups=True)),
        ({"bits": 8, "group_size": 64, "true_sequential": True, "checkpoint_format": "gptq"}, "int8-g64", GPTQ()),
        ({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, "int4-g128-asym", AWQ()),
        ({"w_bit": 4, "q_group_size": 64, "zero_point": False, "duo_scaling": "both"}, "int4-g64", AWQ(duo_scaling="both")),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": None}, "int4-g128-asym", AWQ()),
        ({"quant_method": "gptq", "bits": 4}, "int4-g128", GPTQ()),
    ],
)
def test_familiar_options_become_arguments_of_patch(options: dict[str, Any], spec: str, algorithm: object) -> None:
    assert from_options(options) == {"spec": spec, "algorithm": algorithm, "skip": ("lm_head",)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"desc_ac": True}, "did you mean 'desc_act'"),
        ({"w_bit": 4, "desc_act": True}, "'desc_act' is none of awq's"),
        ({"w_bit": 4, "bits": 8}, "w_bit=4 and bits=8 disagree"),
        ({"bits": 5}, "2, 3, 4 or 8 bits"),
        ({"quant_method": "aqlm"}, "expected 'gptq' or 'awq'"),
        ({"true_sequential": False}, "drop it"),
        ({"lm_head": True}, r"skip=\(\)"),
        ({"group_size": 12}, "group_size=12"),
    ],
)
def test_what_cannot_be_read_or_done_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(quantlib.QuantlibError, match=words):
        from_options(options)


def test_patch_takes_them_and_leaves_what_is_not_to_be_converted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(50, 32))
    model.add_module("up_proj", nn.Linear(32, 64))
    model.add_module("gate", nn.Linear(64, 16))
    options = {"bits": 4, "group_size": 32, "sym": False, "modules_to_not_convert": ["gate"]}
    report = quantlib.patch(model, **from_options(options), calibration=torch.randint(0, 50, (8, 16)), progress=False)
    assert [(layer.name, layer.format, layer.algorithm) for layer in report.layers] == [("up_proj", "int4-g32-asym", "gptq")]
    assert report.skipped == ("gate",)

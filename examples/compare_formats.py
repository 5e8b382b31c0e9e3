"""Measure what several formats cost a model: one run of the original, then each candidate against its logits.

    python examples/compare_formats.py int4-g64 int4-g64-full nvfp4-46

The demo model's own weights came from a 4-bit grid (Q4_1): see docs/quality.md before believing a ranking.
"""

import copy
import sys

import quantlib
from quantlib.evaluation import capture_reference, default_text, evaluate, make_windows
from quantlib.integrations.demo_model import CAVEAT, load_demo_model

specs = sys.argv[1:] or ["int4-g64", "nf4"]
model, tokenizer = load_demo_model()
windows = make_windows(default_text(), tokenizer, window=512, windows=4)

with capture_reference(model, windows) as reference:
    print("original:", reference.evaluation)
    for spec in specs:
        candidate = copy.deepcopy(model)
        report = quantlib.patch(candidate, spec, progress=False)
        result = evaluate(candidate, windows, reference=reference)
        ratio = result.ratio_to(reference.evaluation)
        print(
            f"{spec} ({report.bits_per_weight:.3f} bits): {result}; ln ratio {ratio.ln_ratio:.4f} ± {ratio.ln_ratio_error:.4f}"
        )
print(CAVEAT)

"""Level 2: other people's bytes, and our own, <-> QuantizedTensor."""

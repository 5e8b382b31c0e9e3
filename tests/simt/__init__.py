"""The emulator of a GPU's threads on which the CUDA kernels are tested: see README.md."""

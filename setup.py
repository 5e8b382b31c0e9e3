"""Builds the compiled kernels. What was built, what was not and why is written to quantlib/_build.json for `quantlib doctor`.

quantlib._cpu   csrc/cpu, by a C++ compiler (build_tools/cpu.py)
quantlib._cuda  csrc/cuda, by nvcc (build_tools/cuda.py, docs/building.md)

Both are optional: the package installs without them and runs on its other kernels.

Environment: CXX and CXXFLAGS as usual; QUANTLIB_CUDA (0, 1, auto), QUANTLIB_CUDA_ARCHS, CUDA_HOME, CUTLASS_PATH, MAX_JOBS.
"""

import sys
from pathlib import Path

from setuptools import setup

# Builders that isolate themselves run this file without its folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_tools.extensions import EXTENSIONS, BuildKernels

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildKernels})

// What each folder of kernels adds to quantlib._cuda: a bindings.cpp that defines its function here, compiled by the C++ compiler
// with the CUDA runtime's headers. csrc/cuda/bindings.cpp calls those whose folder was built (QUANTLIB_HAS_...).
//
// Launchers are named {arch}_{operation}_{layout}; they take addresses and the stream as integers, never a torch header, and run on
// the device that is current in the calling thread.
#pragma once

#include <pybind11/pybind11.h>

namespace quantlib::cuda {

void bind_common(pybind11::module_& module);
void bind_sm80(pybind11::module_& module);
void bind_sm90(pybind11::module_& module);
void bind_sm100(pybind11::module_& module);
void bind_sm120(pybind11::module_& module);

}  // namespace quantlib::cuda

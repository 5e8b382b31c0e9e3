// What csrc/cpu/bindings_quantize.cpp adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace quantlib::cpu {

void bind_quantize(pybind11::module_& module);

}  // namespace quantlib::cpu

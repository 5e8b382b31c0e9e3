// What csrc/cpu/bindings_program.cpp adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace quantlib::cpu {

void bind_program(pybind11::module_& module);

}  // namespace quantlib::cpu

// Which instruction set runs. Compiled for the baseline.
#pragma once

#include <string>
#include <vector>

#include "types.h"

namespace quantlib::cpu {

// The sets that were compiled and that this machine and its operating system run, slowest first.
std::vector<std::string> available_isas();

// Choose at start: the best available set, or QUANTLIB_CPU_ISA where that is lower.
// Throws std::invalid_argument where the variable holds an unknown word.
void choose_isa();

// Choose by name. Throws std::invalid_argument where it is not available.
void set_isa(const std::string& name);

const std::string& isa();
const Kernels& kernels();

}  // namespace quantlib::cpu

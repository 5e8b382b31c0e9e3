// Which instruction set runs. Compiled for the baseline.
#pragma once

#include <string>
#include <vector>

#include "features.h"
#include "types.h"

namespace quantlib::cpu {

// The sets that were compiled and that a machine with these features runs, slowest first: never without "scalar". What the
// machine at hand runs is decided by this function and no other.
std::vector<std::string> isas_for(Features features);

// The last of them, or of those up to `limit` where one is given: a limit lowers and never raises.
// Throws std::invalid_argument where the limit is no instruction set.
std::string isa_for(Features features, const std::string& limit);

// What a compiled set needs. Throws std::invalid_argument where there is no such set.
Features needs_of(const std::string& isa);

// This machine's, as its CPU and its operating system have it.
Features machine_features();

// isas_for(machine_features()).
std::vector<std::string> available_isas();

// Choose at start: isa_for(machine_features(), QUANTLIB_CPU_ISA).
// Throws std::invalid_argument where the variable holds an unknown word.
void choose_isa();

// Choose by name. Throws std::invalid_argument where it is not available.
void set_isa(const std::string& name);

std::string isa();
const Kernels& kernels();

}  // namespace quantlib::cpu

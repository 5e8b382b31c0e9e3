// Compiled once per instruction set (setup.py): everything the set offers, behind one table of functions.
#include "dequantize.h"
#include "linear.h"

namespace quantlib::cpu::QUANTLIB_ISA {

extern const Kernels kernels;
const Kernels kernels = {linear, dequantize};

}  // namespace quantlib::cpu::QUANTLIB_ISA

// Compiled once per instruction set (setup.py): everything the set offers, behind one table of functions.
#include "dequantize.h"
#include "encode.h"
#include "extremes.h"
#include "linear.h"
#include "search.h"

namespace quantlib::cpu::QUANTLIB_ISA {

extern const Kernels kernels;
const Kernels kernels = {linear, dequantize, extremes, encode, sums, search};

}  // namespace quantlib::cpu::QUANTLIB_ISA

// Compiled once per instruction set (build_tools/cpu.py): everything the set offers, behind one table of functions.
#include "dequantize.h"
#include "encode.h"
#include "extremes.h"
#include "linear.h"
#include "pairs_dgrad.h"
#include "pairs_dot.h"
#include "pairs_tile.h"
#include "search.h"

namespace quantlib::cpu::QUANTLIB_ISA {

extern const Kernels kernels;
#ifdef QUANTLIB_HAS_PAIRS
const Kernels kernels = {linear, pairs_dot, pairs_tile, pairs_dgrad, dequantize, extremes, encode, sums, search};
#else
const Kernels kernels = {linear, nullptr, nullptr, nullptr, dequantize, extremes, encode, sums, search};
#endif

}  // namespace quantlib::cpu::QUANTLIB_ISA

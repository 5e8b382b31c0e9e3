// Compiled once per instruction set (build_tools/cpu.py): everything the set offers, behind one table of functions.
#include "decoding.h"
#include "dequantize.h"
#include "encode.h"
#include "extremes.h"
#include "linear.h"
#include "pairs_dgrad.h"
#include "pairs_dot.h"
#include "pairs_tile.h"
#include "quads_dot.h"
#include "search.h"

#if QUANTLIB_ISA_LEVEL >= 2
// Wider sets run AVX2's: it is compiled in that set's object file alone.
namespace quantlib::cpu::avx2 {
bool quads_dot(const LinearCall& call);
}
#endif

namespace quantlib::cpu::QUANTLIB_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    linear,
#ifdef QUANTLIB_HAS_PAIRS
    pairs_dot,
    pairs_tile,
    pairs_dgrad,
#else
    nullptr,
    nullptr,
    nullptr,
#endif
#if QUANTLIB_ISA_LEVEL >= 2
    avx2::quads_dot,
#elif defined(QUANTLIB_HAS_QUADS)
    quads_dot,
#else
    nullptr,
#endif
    dequantize,
    extremes,
    encode,
    sums,
    search,
    rms_norm,
    rotate,
    attention,
    gate,
    add_to,
    dense,
};

}  // namespace quantlib::cpu::QUANTLIB_ISA

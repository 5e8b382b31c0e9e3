// Compiled once per instruction set (build_tools/cpu.py): everything the set offers, behind one table of functions.
#include "amx_dgrad.h"
#include "amx_strip.h"
#include "amx_linear.h"
#include "decoding.h"
#include "dequantize.h"
#include "encode.h"
#include "extremes.h"
#include "int8_tile.h"
#include "linear.h"
#include "pairs_dgrad.h"
#include "pairs_dot.h"
#include "pairs_strip.h"
#include "pairs_strip_tile.h"
#include "pairs_tile.h"
#include "prompt_attention.h"
#include "prompt_steps.h"
#include "rows_to_int8.h"
#include "search.h"

#if QUANTLIB_ISA_LEVEL == 1 || QUANTLIB_ISA_LEVEL == 2
// lookup.cpp, compiled for AVX2 alone: it serves AVX-512 without BF16 too.
namespace quantlib::cpu::avx2 {
bool lookup_dot(const Joined<LinearCall>& joined);
bool lookup_tile(const LinearCall& call);
}  // namespace quantlib::cpu::avx2
#endif

namespace quantlib::cpu::QUANTLIB_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    linear,
#ifdef QUANTLIB_HAS_PAIRS
    pairs_dot,
    pairs_strip,
    pairs_strip_tile,
    pairs_tile,
    pairs_dgrad,
#else
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
#endif
#ifdef QUANTLIB_HAS_TILES
    amx_strip,
    amx_linear,
    amx_dgrad,
#else
    nullptr,
    nullptr,
    nullptr,
#endif
    rows_to_int8,
#ifdef QUANTLIB_HAS_INT8
    int8_tile,
#else
    nullptr,
#endif
#if QUANTLIB_ISA_LEVEL == 1 || QUANTLIB_ISA_LEVEL == 2
    avx2::lookup_dot,
    avx2::lookup_tile,
#else
    nullptr,
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
    prompt_attention,
    prompt_norm,
    prompt_gate,
    prompt_rotate,
    gate,
    add_to,
    dense,
};

}  // namespace quantlib::cpu::QUANTLIB_ISA

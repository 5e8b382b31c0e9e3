// One vocabulary of vectors, three spellings; simd_pairs.h and simd_amx.h add to the last. QUANTLIB_ISA_LEVEL (set by
// build_tools/cpu.py per object file) picks one, and each gets a namespace of its own: the kernels above are written once and compiled
// for every set into one library.
//
// Rule for every header below: no standard-library templates and no function outside the namespace. An inline function that is
// shared between object files is kept once by the linker, maybe the AVX-512 copy, and would crash a machine without AVX-512.
// Nor a global variable that is computed at loading. tests/test_cpu_machine_code.py reads what came of it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "types.h"

// Where a call would send vectors through memory.
#define QUANTLIB_INLINE inline __attribute__((always_inline))
#define QUANTLIB_LAMBDA __attribute__((always_inline))

#if QUANTLIB_ISA_LEVEL == 4
#define QUANTLIB_ISA amx
#include "simd_avx512.h"
#elif QUANTLIB_ISA_LEVEL == 3
#define QUANTLIB_ISA avx512_bf16
#include "simd_avx512.h"
#elif QUANTLIB_ISA_LEVEL == 2
#define QUANTLIB_ISA avx512
#include "simd_avx512.h"
#elif QUANTLIB_ISA_LEVEL == 1
#define QUANTLIB_ISA avx2
#include "simd_avx2.h"
#else
#define QUANTLIB_ISA scalar
#include "simd_scalar.h"
#endif

namespace quantlib::cpu::QUANTLIB_ISA {

// Columns that are decoded together: whole bytes in every plane, a whole number of vectors in every spelling.
constexpr int CHUNK = 32;
constexpr int VECTORS = CHUNK / LANES;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Ask for the cache line of an address, which may lie anywhere: into the first-level cache, the second-level cache, or, of what is read
// once and should push nothing out, past it. The empty statement is an effect: gcc takes a function that does nothing but prefetch for
// one without any, and drops the calls of it.
template <int LOCALITY>
QUANTLIB_INLINE void fetch_for(const void* address) {
    __builtin_prefetch(address, 0, LOCALITY);
    __asm__ volatile("");
}
#if QUANTLIB_ISA_LEVEL >= 4
// CPUs with tile registers are Intel's: what goes past the second-level cache there waits in the sixteen buffers of the first.
constexpr int READ_ONCE = 2;
#else
constexpr int READ_ONCE = 0;
#endif
QUANTLIB_INLINE void fetch_near(const void* address) { fetch_for<3>(address); }
QUANTLIB_INLINE void fetch(const void* address) { fetch_for<2>(address); }
QUANTLIB_INLINE void fetch_once(const void* address) { fetch_for<READ_ONCE>(address); }

// Two planes of a code: `low` in LOW bits, `high` above them. Bits above the code are left as they come.
template <int LOW>
inline Ints join(Ints low, Ints high) {
    return either(clean<LOW>(low), shift_left<LOW>(high));
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

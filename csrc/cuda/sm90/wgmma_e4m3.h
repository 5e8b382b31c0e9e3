// Products of E4M3 numbers, both operands in shared memory.
//
// The tensor cores of Hopper keep 13 bits after the point of such a sum and cut off the rest, at every step along K: who wants
// sums in fp32 begins anew after few steps and adds up the results himself.
#pragma once

#include "../common/ptx90.h"

namespace quantlib::cuda {

#ifndef QUANTLIB_SIMT
namespace detail {

// ADD: 1, added to d, or 0; 1, 1: neither factor negated. Eight-bit operands always lie along K.
#define QL_WGMMA_E4M3_FOR(N, SUMS, A, B, ADDED)                                                                         \
    template <bool ADD>                                                                                                 \
    QL_DEVICE void wgmma_e4m3(float (&d)[SUMS], uint64_t a, uint64_t b) {                                               \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" QL_WGMMA_NAMES_##SUMS "}, %" #A       \
                     ", %" #B ", %" #ADDED ", 1, 1;"                                                                    \
                     : QL_WGMMA_SUMS_##SUMS                                                                             \
                     : "l"(a), "l"(b), "n"(int(ADD)));                                                                  \
    }

QL_WGMMA_E4M3_FOR(16, 8, 8, 9, 10)
QL_WGMMA_E4M3_FOR(32, 16, 16, 17, 18)
QL_WGMMA_E4M3_FOR(64, 32, 32, 33, 34)
QL_WGMMA_E4M3_FOR(128, 64, 64, 65, 66)

#undef QL_WGMMA_E4M3_FOR

}  // namespace detail
#endif

// d += a b, or d = a b where not ADD, with a 64 x 32 and b 32 x N, N of {16, 32, 64, 128}, by their descriptors; starts it, as
// wgmma_m64k16, whose order d has.
template <bool ADD, int N>
QL_DEVICE void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, [[maybe_unused]] Site site = Site::current()) {
    static_assert(N == 16 || N == 32 || N == 64 || N == 128);
#ifdef QUANTLIB_SIMT
    if (!ADD) {
        for (float& each : d) each = 0.0f;
    }
    simt::wgmma_e4m3(N, d, a, b, site);
#else
    detail::wgmma_e4m3<ADD>(d, a, b);
#endif
}

}  // namespace quantlib::cuda

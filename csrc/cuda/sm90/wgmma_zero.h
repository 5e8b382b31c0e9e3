// The product that begins new sums: d = a b instead of d += a b, so that nobody has to write zeros into registers first.
#pragma once

#include "../common/ptx90.h"

namespace quantlib::cuda {

#ifndef QUANTLIB_SIMT
namespace detail {

// 0: not added to d; 1, 1: neither factor negated; 0: B lies along K. IN: the operands that follow the sums.
#define QL_WGMMA_ZERO(N, SUMS, IN, TYPE)                                                                              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" QL_WGMMA_NAMES_##SUMS "}, " IN  \
                 ", 0, 1, 1, 0;"                                                                                      \
                 : QL_WGMMA_SUMS_##SUMS                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor))

#define QL_WGMMA_ZERO_FOR(N, SUMS, IN)                                                                \
    template <class T>                                                                                \
    QL_DEVICE void wgmma_zero(float (&d)[SUMS], const uint32_t (&a)[4], uint64_t descriptor) {        \
        if constexpr (IS_HALF<T>) {                                                                   \
            QL_WGMMA_ZERO(N, SUMS, IN, "f16");                                                        \
        } else {                                                                                      \
            QL_WGMMA_ZERO(N, SUMS, IN, "bf16");                                                       \
        }                                                                                             \
    }

QL_WGMMA_ZERO_FOR(16, 8, "{%8, %9, %10, %11}, %12")
QL_WGMMA_ZERO_FOR(32, 16, "{%16, %17, %18, %19}, %20")
QL_WGMMA_ZERO_FOR(64, 32, "{%32, %33, %34, %35}, %36")
QL_WGMMA_ZERO_FOR(128, 64, "{%64, %65, %66, %67}, %68")

#undef QL_WGMMA_ZERO_FOR
#undef QL_WGMMA_ZERO

}  // namespace detail
#endif

// As wgmma_m64k16, and d counts as zeros.
template <class T, int N>
QL_DEVICE void wgmma_m64k16_zero(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t descriptor,
                                 [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    for (float& each : d) each = 0.0f;
    simt::wgmma(simt::kind_of<IS_HALF<T>>(), N, d, a, descriptor, site);
#else
    detail::wgmma_zero<T>(d, a, descriptor);
#endif
}

// The compiler must not give these A registers to others, nor write them, before the wait that this stands behind.
QL_DEVICE void wgmma_hold([[maybe_unused]] uint32_t (&a)[2][4]) {
#ifndef QUANTLIB_SIMT
    QL_UNROLL
    for (int i = 0; i < 2; ++i) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3]));
#endif
}

}  // namespace quantlib::cuda

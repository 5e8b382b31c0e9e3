// fp32 numbers to small floats: instructions of sm_89 and of the families of sm_100 and sm_120, and beside them their meaning,
// which is also what other chips execute.
#pragma once

#include "numbers.h"

namespace quantlib::cuda {

#if !defined(QUANTLIB_SIMT) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define QL_CONVERTS_E4M3
#endif
// What nvcc says of code for a family (sm_100f), or for one chip of it (sm_100a, before CUDA 12.9).
#if !defined(QUANTLIB_SIMT) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 &&                                \
    (defined(__CUDA_ARCH_FAMILY_SPECIFIC__) || defined(__CUDA_ARCH_FEAT_SM100_ALL) ||                            \
     defined(__CUDA_ARCH_FEAT_SM103_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL))
#define QL_CONVERTS_E2M1
#endif

QL_DEVICE uint32_t to_bits(float number) {
#ifdef QUANTLIB_SIMT
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
#else
    return __float_as_uint(number);
#endif
}

// The code without its sign of the small float nearest to x, no NaN: ties to the even code, saturating at TOP, whose value is
// `largest`. MANTISSA: its bits; STEP: the smallest step is 2^STEP.
template <int MANTISSA, int STEP, uint32_t TOP>
QL_DEVICE uint32_t nearest_code(float x, float largest) {
    const float magnitude = from_bits(to_bits(x) & 0x7FFFFFFF);
    if (magnitude >= largest) return TOP;
    // Added to a number whose last bit weighs a step, the sum is rounded to a step.
    constexpr uint32_t COUNTER = (127 + STEP + 23) << 23;
    if (magnitude < from_bits((127 + STEP + MANTISSA) << 23)) {
        return to_bits(add_rounded(magnitude, from_bits(COUNTER))) - COUNTER;
    }
    // From there on codes, like fp32's bits, count exponent and mantissa as one number.
    constexpr int DROPPED = 23 - MANTISSA;
    const uint32_t bits = to_bits(magnitude), odd = bits >> DROPPED & 1;
    return ((bits + (1u << (DROPPED - 1)) - 1 + odd) >> DROPPED) - ((127 + STEP + MANTISSA - 1) << MANTISSA);
}

// Two E4M3 codes, `lo` in the low byte: to nearest even, beyond 448 it, the sign of zero kept; 0x7F for a NaN.
QL_DEVICE uint32_t convert_e4m3x2(float lo, float hi) {
#ifdef QL_CONVERTS_E4M3
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(hi), "f"(lo));
    return codes;
#else
    const auto code = [](float x) { return x == x ? nearest_code<3, -9, 0x7E>(x, 448.0f) | (to_bits(x) >> 31 << 7) : 0x7Fu; };
    return code(lo) | code(hi) << 8;
#endif
}

// Two E2M1 codes, `lo` in the low four bits: to nearest even, beyond 6 it, the sign of zero kept; 6 for a NaN.
QL_DEVICE uint32_t convert_e2m1x2(float lo, float hi) {
#ifdef QL_CONVERTS_E2M1
    uint32_t codes;
    asm("{\n"
        ".reg .b8 pair;\n"
        "cvt.rn.satfinite.e2m1x2.f32 pair, %1, %2;\n"
        "cvt.u32.u8 %0, pair;\n"
        "}"
        : "=r"(codes)
        : "f"(hi), "f"(lo));
    return codes;
#else
    const auto code = [](float x) { return x == x ? nearest_code<1, -1, 7>(x, 6.0f) | (to_bits(x) >> 31 << 3) : 7u; };
    return code(lo) | code(hi) << 4;
#endif
}

}  // namespace quantlib::cuda

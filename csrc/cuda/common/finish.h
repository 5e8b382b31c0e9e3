// The last arithmetic of a product: sums become bf16 or fp16 numbers.
#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include <cstdint>

namespace quantlib::cuda {

// Which 16-bit type bias and result have.
struct SixteenBits {
    bool half = false;
};

// sum, alpha, bias -> the result as CUTLASS's own conversion to bf16 will store it.
//
// For an fp16 result the 16 bits of the fp16 number are handed over as the upper half of an fp32 number: rounding that to bf16
// drops only zeros and gives these bits back. (Subnormal and infinite patterns pass unchanged; a NaN stays one.) The bias comes
// in alike: its 16 bits, taken for bf16, are the upper half of an fp32 number.
template <class T>
struct Finish {
    using Arguments = SixteenBits;
};

template <int Count>
struct Finish<cutlass::Array<float, Count>> {
    using Arguments = SixteenBits;
    using Fragment = cutlass::Array<float, Count>;

    CUTLASS_HOST_DEVICE
    Fragment operator()(const Fragment& sum, const Fragment& alpha, const Fragment& bias, const SixteenBits& y) const {
        Fragment result;
        if (y.half) {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < Count; ++i) {
                const auto bits = static_cast<std::uint16_t>(cutlass::detail::copy_bits<float, std::uint32_t>(bias[i]) >> 16);
                result[i] = sum[i] * alpha[i] + static_cast<float>(cutlass::half_t::bitcast(bits));
            }
            const auto halves = cutlass::NumericArrayConverter<cutlass::half_t, float, Count>{}(result);
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < Count; ++i) {
                const auto bits = static_cast<std::uint32_t>(cutlass::half_t(halves[i]).raw()) << 16;
                result[i] = cutlass::detail::copy_bits<std::uint32_t, float>(bits);
            }
        } else {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < Count; ++i) {
                result[i] = sum[i] * alpha[i] + bias[i];
            }
        }
        return result;
    }
};

}  // namespace quantlib::cuda

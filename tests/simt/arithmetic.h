// Arithmetic on bit patterns as the GPU does it: 16-bit numbers rounded once to nearest even, denormals kept, NaN always
// 0x7FFF.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace simt {

enum class Kind { half, bf16 };

template <bool IS_HALF>
constexpr Kind kind_of() {
    return IS_HALF ? Kind::half : Kind::bf16;
}

template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

inline float widen(Kind kind, uint16_t bits) {
    if (kind == Kind::bf16) return std::bit_cast<float>(uint32_t(bits) << 16);
    return float(std::bit_cast<_Float16>(bits));
}

// A number of E4M3, whose bias is 7; it has no infinities.
inline float widen_e4m3(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 0x7F) == 0x7F) return std::bit_cast<float>(0x7FFFFFFFu);
    const float magnitude = exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10);
    return (code & 0x80) != 0 ? -magnitude : magnitude;
}

// The number without what lies below 13 bits after its point.
inline float cut_to_13(double value) {
    return float(std::bit_cast<double>(std::bit_cast<uint64_t>(value) >> 39 << 39));
}

// The nearest 16-bit number, ties to even.
inline uint16_t narrow(Kind kind, double value) {
    const int digits = kind == Kind::half ? 11 : 8, smallest = kind == Kind::half ? -14 : -126;
    const uint64_t infinity = kind == Kind::half ? 0x7C00 : 0x7F80;
    const uint64_t pattern = std::bit_cast<uint64_t>(value);
    const uint16_t sign = uint16_t(pattern >> 48 & 0x8000);
    const uint64_t magnitude = pattern << 1 >> 1;
    if (magnitude > 0x7FF0000000000000u) return 0x7FFF;
    if (magnitude == 0x7FF0000000000000u) return uint16_t(sign | infinity);
    int exponent = int(magnitude >> 52) - 1023;
    if (exponent > 300) return uint16_t(sign | infinity);
    if (exponent < smallest) exponent = smallest;  // below it the step between numbers stays the same
    const double steps_in_one = std::bit_cast<double>(uint64_t(1023 + digits - 1 - exponent) << 52);
    const uint64_t steps = uint64_t(__builtin_rint(std::bit_cast<double>(magnitude) * steps_in_one));
    // A normal number's steps begin at 2^(digits - 1): that bit adds the last one to the exponent field, and so does a carry.
    const uint64_t bits = (uint64_t(exponent - smallest) << (digits - 1)) + steps;
    return uint16_t(sign | (bits < infinity ? bits : infinity));
}

// a * b + c, rounded once. The product is exact in double; the sum is rounded to odd there, which a later rounding to fewer
// digits can't tell from the exact sum.
inline uint16_t fma(Kind kind, uint16_t a, uint16_t b, uint16_t c) {
    const double product = double(widen(kind, a)) * double(widen(kind, b)), addend = widen(kind, c);
    const double sum = product + addend;
    if (!std::isfinite(sum)) return narrow(kind, sum);
    const double other = sum - product;
    const double lost = (product - (sum - other)) + (addend - other);
    uint64_t bits = std::bit_cast<uint64_t>(sum);
    if (lost != 0 && (bits & 1) == 0) bits += (lost > 0) == (sum > 0) ? 1 : -1;
    return narrow(kind, std::bit_cast<double>(bits));
}

inline uint32_t fma2(Kind kind, uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t lo = fma(kind, uint16_t(a), uint16_t(b), uint16_t(c));
    const uint32_t hi = fma(kind, uint16_t(a >> 16), uint16_t(b >> 16), uint16_t(c >> 16));
    return lo | hi << 16;
}

inline uint32_t pack2(Kind kind, float lo, float hi) { return narrow(kind, lo) | uint32_t(narrow(kind, hi)) << 16; }

inline uint32_t lop3(int table, uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    for (int row = 0; row < 8; ++row) {
        if (table >> row & 1) d |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    }
    return d;
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t d = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t digit = selector >> 4 * i;
        const uint32_t byte = uint32_t(bytes >> 8 * (digit & 7)) & 0xFF;
        d |= (digit & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << 8 * i;
    }
    return d;
}

}  // namespace simt

// Scales 64 at a time, by look-ups of bytes: the two bytes of a bf16 number, which holds every code's value. For instruction sets with
// VBMI; the others have slower ways of their own (simd_avx512.h, simd_avx2.h) or none.
#pragma once

#include "simd.h"

#if QUANTLIB_ISA_LEVEL >= 3
#define QUANTLIB_HAS_SIX
#define QUANTLIB_HAS_E4M3_RUN

namespace quantlib::cpu::QUANTLIB_ISA {

// The bytes of COUNT bf16 numbers.
template <int COUNT>
struct ByteHalves {
    alignas(64) uint8_t low[COUNT], high[COUNT];
};

// `units` * 2^exponent, which bf16 holds, as bf16.
constexpr uint16_t bfloat_of(int units, int exponent) {
    if (units == 0) return 0;
    const int sign = units < 0 ? 0x8000 : 0, magnitude = units < 0 ? -units : units;
    int top = 0;
    while (magnitude >> (top + 1) != 0) ++top;
    return uint16_t(sign | (top + exponent + 127) << 7 | ((magnitude << 7 >> top) & 0x7F));
}
template <int COUNT, class Number>
constexpr ByteHalves<COUNT> byte_halves(Number number) {
    ByteHalves<COUNT> halves = {};
    for (int code = 0; code < COUNT; ++code) {
        const uint16_t word = number(code);
        halves.low[code] = uint8_t(word), halves.high[code] = uint8_t(word >> 8);
    }
    return halves;
}
constexpr uint16_t e4m3_magnitude(int code) {
    const int exponent = code >> 3, fraction = code & 7;
    if (code == 0x7F) return 0x7FC0;
    return exponent == 0 ? bfloat_of(fraction, -9) : bfloat_of(8 + fraction, exponent - 10);
}
constexpr uint16_t six_unsigned(int code) { return bfloat_of(code, 0); }
constexpr uint16_t six_signed(int code) { return bfloat_of(code - 32, 0); }
constexpr ByteHalves<128> E4M3_BYTES = byte_halves<128>(e4m3_magnitude);
constexpr ByteHalves<64> SIX_BYTES = byte_halves<64>(six_unsigned), SIGNED_SIX_BYTES = byte_halves<64>(six_signed);

// Each lane of four bytes moved so that what float_quarters() makes of 64 bytes comes out in order: lane 4q + j holds those of lane
// 4j + q.
QUANTLIB_INLINE Ints lane_order() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }
// Bytes of bf16 numbers -> the numbers, a quarter of them in each vector.
QUANTLIB_INLINE void float_quarters(Ints low, Ints high, Floats (&out)[4]) {
    const Ints none = _mm512_setzero_si512();
    const Ints first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, first));
    out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, first));
    out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, second));
    out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, second));
}

// The two bytes of a bf16 number for each of 64 codes.
QUANTLIB_INLINE void e4m3_halves(Ints codes, Ints& lows, Ints& highs) {
    const uint8_t *low = E4M3_BYTES.low, *high = E4M3_BYTES.high;
    lows = _mm512_permutex2var_epi8(_mm512_load_si512(low), codes, _mm512_load_si512(low + 64));
    const Ints magnitudes = _mm512_permutex2var_epi8(_mm512_load_si512(high), codes, _mm512_load_si512(high + 64));
    highs = _mm512_ternarylogic_epi32(magnitudes, codes, _mm512_set1_epi8(char(0x80)), 0xF8);  // or, and
}

constexpr int E4M3_RUN = 64;  // E4M3 codes that are read together
// So many times `factor`.
QUANTLIB_INLINE void read_e4m3_run(const uint8_t* from, Floats factor, float* to) {
    Ints lows, highs;
    e4m3_halves(_mm512_permutexvar_epi32(lane_order(), _mm512_loadu_si512(from)), lows, highs);
    Floats numbers[4];
    float_quarters(lows, highs, numbers);
    for (int v = 0; v < 4; ++v) store(to + v * LANES, multiply(numbers[v], factor));
}

// Codes of six bits, less the offset, 0 or 32.
struct SixNumbers {
    Ints low, high;
};
QUANTLIB_INLINE SixNumbers six_numbers(float offset) {
    const ByteHalves<64>& bytes = offset == 0.0f ? SIX_BYTES : SIGNED_SIX_BYTES;
    return {_mm512_load_si512(bytes.low), _mm512_load_si512(bytes.high)};
}

// 64 of them, out of a plane of four bits and one of two, times their units: eight share one, of fp16.
QUANTLIB_INLINE void read_six_run(const uint8_t* fours, const uint8_t* twos, const uint8_t* units, const SixNumbers& numbers,
                                  float* to) {
    // The bits of lanes 2p and 2p + 1 of lane_order() go into 64 bits, two words of the one plane and two bytes of the other; from
    // there each code gets its byte, the upper two bits four places up.
    const Ints two_words = _mm512_setr_epi64(0x40000, 0xC0008, 0x50001, 0xD0009, 0x60002, 0xE000A, 0x70003, 0xF000B);
    const Ints two_bytes = _mm512_setr_epi64(0x400, 0xC08, 0x501, 0xD09, 0x602, 0xE0A, 0x703, 0xF0B);
    const Ints by_four = _mm512_set1_epi64(0x1C1814100C080400), by_two = _mm512_set1_epi64(0x0A08060402003E3C);
    const Ints lower = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(fours)));
    const Ints upper = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(twos)));
    const Ints nibbles = _mm512_multishift_epi64_epi8(by_four, _mm512_permutexvar_epi16(two_words, lower));
    const Ints pairs = _mm512_multishift_epi64_epi8(by_two, _mm512_permutexvar_epi8(two_bytes, upper));
    const Ints codes = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0F), nibbles, pairs, 0xCA);  // bits above a code don't count

    Floats out[4];
    float_quarters(_mm512_permutexvar_epi8(codes, numbers.low), _mm512_permutexvar_epi8(codes, numbers.high), out);
    const Floats unit = _mm512_castps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(units))));
    for (int v = 0; v < 4; ++v) {
        const Ints index = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        const Floats factor = _mm512_permutexvar_ps(_mm512_add_epi32(index, _mm512_set1_epi32(2 * v)), unit);
        store(to + v * LANES, multiply(out[v], factor));
    }
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

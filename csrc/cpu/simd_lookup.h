// Bytes of codes and how they become fp32: what the look-up kernels need beside simd_avx2.h. For AVX2 alone.
#pragma once

#include "simd.h"

#if QUANTLIB_ISA_LEVEL == 1
#define QUANTLIB_HAS_LOOKUP

namespace quantlib::cpu::QUANTLIB_ISA {

// Keep the compiler from knowing where a pointer points.
template <class T>
QUANTLIB_INLINE void hide(T*& pointer) { __asm__("" : "+r"(pointer)); }

QUANTLIB_INLINE Ints load_bytes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
QUANTLIB_INLINE Ints same_bytes(int byte) { return _mm256_set1_epi8(char(byte)); }
QUANTLIB_INLINE Floats negative_multiply_add(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }

// Bits FROM ... of every byte, moved to bits TO ..., WIDTH of them.
template <int FROM, int TO, int WIDTH>
QUANTLIB_INLINE Ints place(Ints bytes) {
    if constexpr (TO > FROM) bytes = _mm256_slli_epi16(bytes, TO - FROM);
    if constexpr (TO < FROM) bytes = _mm256_srli_epi16(bytes, FROM - TO);
    return _mm256_and_si256(bytes, same_bytes(((1 << WIDTH) - 1) << TO));
}

// 64 codes of one plane: byte i holds code 2i from bit 0 and code 2i + 1 from bit WIDTH up; what lies above means nothing.
template <int WIDTH>
QUANTLIB_INLINE Ints load_twos(const uint8_t* from) {
    static_assert(WIDTH == 1 || WIDTH == 2 || WIDTH == 4);
    if constexpr (WIDTH == 4) return load_bytes(from);
    if constexpr (WIDTH == 2) {
        const Ints words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return either(words, _mm256_slli_epi16(words, 4));
    }
    const Ints one = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    const Ints two = either(one, _mm256_slli_epi32(one, 12));
    return either(two, _mm256_slli_epi32(two, 6));
}

// Lanes whose words are two bf16: the low one, the high one.
QUANTLIB_INLINE Floats low_floats(Ints pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
QUANTLIB_INLINE Floats high_floats(Ints pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xFFFF0000u))));
}
// The same with lower halves: words of the upper 16 bits of fp32, and words of the lower ones.
QUANTLIB_INLINE Floats low_floats(Ints upper, Ints lower) {
    return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_slli_epi32(upper, 16), lower, 0x55));
}
QUANTLIB_INLINE Floats high_floats(Ints upper, Ints lower) {
    return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_srli_epi32(lower, 16), upper, 0xAA));
}

// Bytes of a and b by turns, a's lower: of each half's first and last eight.
QUANTLIB_INLINE Ints low_words(Ints a, Ints b) { return _mm256_unpacklo_epi8(a, b); }
QUANTLIB_INLINE Ints high_words(Ints a, Ints b) { return _mm256_unpackhi_epi8(a, b); }

// 16 bytes, in both halves.
QUANTLIB_INLINE Ints byte_table(const uint8_t* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
QUANTLIB_INLINE Ints look_up_bytes(Ints table, Ints codes) { return _mm256_shuffle_epi8(table, codes); }

// Four floats, in both halves; and lanes picked out of each half.
QUANTLIB_INLINE Floats load_four(const float* from) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from)); }
QUANTLIB_INLINE Floats pick_lanes(Floats a, Ints which) { return _mm256_permutevar_ps(a, which); }

// The sum of each of four vectors.
QUANTLIB_INLINE __m128 four_sums(Floats a, Floats b, Floats c, Floats d) {
    const Floats ab = add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const Floats cd = add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const Floats all = add(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

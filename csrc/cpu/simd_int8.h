// Products of bytes, four to a lane of 32 bits: what AVX-512 VNNI adds to simd_avx512.h.
#pragma once

#include "planes.h"

#if QUANTLIB_ISA_LEVEL >= 3
#define QUANTLIB_HAS_INT8

namespace quantlib::cpu::QUANTLIB_ISA {

QUANTLIB_INLINE Ints same_bytes(int byte) { return _mm512_set1_epi8(char(byte)); }
// Every lane holds the four bytes at an address.
QUANTLIB_INLINE Ints same_four(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}

// sum + the four products of each lane: bytes of `a` without a sign, bytes of `b` with one.
QUANTLIB_INLINE Ints dot_bytes(Ints sum, Ints a, Ints b) { return _mm512_dpbusd_epi32(sum, a, b); }

// The 64 codes of one plane, a byte each.
template <int WIDTH>
QUANTLIB_INLINE Ints plane_bytes(const uint8_t* from) {
    if constexpr (WIDTH == 8) return load_ints(from);
    if constexpr (WIDTH == 4) {
        const Ints pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        return _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), same_bytes(0x0F));
    }
    if constexpr (WIDTH == 2) {  // four codes of a byte move apart in a lane
        Ints fours = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        fours = _mm512_or_si512(fours, _mm512_slli_epi32(fours, 12));
        return _mm512_and_si512(_mm512_or_si512(fours, _mm512_slli_epi32(fours, 6)), same_bytes(0x03));
    }
    uint64_t bits;
    memcpy(&bits, from, 8);
    return _mm512_maskz_mov_epi8(bits, same_bytes(1));
}

// 64 codes, a byte each, from column 64 * `at` on.
template <int BITS>
QUANTLIB_INLINE Ints code_bytes(const Planes& planes, int64_t at) {
    constexpr int FIRST = PLANE_WIDTHS[BITS][0], SECOND = PLANE_WIDTHS[BITS][1], THIRD = PLANE_WIDTHS[BITS][2];
    Ints codes = plane_bytes<FIRST>(planes.plane[0] + at * (8 * FIRST));
    // What moves up does not leave its byte.
    if constexpr (SECOND != 0) {
        codes = either(codes, _mm512_slli_epi16(plane_bytes<SECOND>(planes.plane[1] + at * (8 * SECOND)), FIRST));
    }
    if constexpr (THIRD != 0) {
        codes = either(codes, _mm512_slli_epi16(plane_bytes<THIRD>(planes.plane[2] + at * (8 * THIRD)), FIRST + SECOND));
    }
    return codes;
}

// Of codes of up to six bits, the entries of a table of 64; `a - b` byte by byte.
QUANTLIB_INLINE Ints look_up_bytes(Ints codes, Ints table) { return _mm512_permutexvar_epi8(codes, table); }
QUANTLIB_INLINE Ints subtract_bytes(Ints a, Ints b) { return _mm512_sub_epi8(a, b); }

// Sums of `count` lanes each, 1, 2, 4, 8 or 16, in the first lanes.
QUANTLIB_INLINE Ints sum_runs(Ints a, int64_t count) {
    if (count >= 2) a = add(a, _mm512_shuffle_epi32(a, _MM_PERM_ENUM(0xB1)));
    if (count >= 4) a = add(a, _mm512_shuffle_epi32(a, _MM_PERM_ENUM(0x4E)));
    if (count >= 8) a = add(a, _mm512_shuffle_i32x4(a, a, 0xB1));
    if (count >= 16) a = add(a, _mm512_shuffle_i32x4(a, a, 0x4E));
    const Ints lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_epi32(_mm512_mullo_epi32(lane, broadcast_int(int32_t(count))), a);
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

// The AVX2 spelling (with FMA and F16C): eight lanes.
#pragma once

#include <immintrin.h>

namespace quantlib::cpu::avx2 {

constexpr int LANES = 8;
typedef __m256 Floats;
typedef __m256i Ints;

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats broadcast(float value) { return _mm256_set1_ps(value); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Floats a) { _mm256_storeu_ps(to, a); }
inline float sum(Floats a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// Integers

inline Ints either(Ints a, Ints b) { return _mm256_or_si256(a, b); }
template <int BITS>
inline Ints shift_left(Ints a) { return _mm256_slli_epi32(a, BITS); }
template <int BITS>
inline Ints clean(Ints a) { return _mm256_and_si256(a, _mm256_set1_epi32((1 << BITS) - 1)); }
inline Floats number(Ints a) { return _mm256_cvtepi32_ps(a); }

// CHUNK codes of one plane; the bits above a code are those of its neighbours. Eight codes are WIDTH bytes: broadcast them and
// let each lane shift its own code down.
template <int WIDTH>
inline void unpack(const uint8_t* from, Ints* codes) {
    if constexpr (WIDTH == 8) {
        for (int v = 0; v < 4; ++v) {
            codes[v] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * v)));
        }
    } else {
        const Ints shifts = _mm256_setr_epi32(0, WIDTH, 2 * WIDTH, 3 * WIDTH, 4 * WIDTH, 5 * WIDTH, 6 * WIDTH, 7 * WIDTH);
        for (int v = 0; v < 4; ++v) {
            uint32_t bytes = 0;
            memcpy(&bytes, from + v * WIDTH, WIDTH);
            codes[v] = _mm256_srlv_epi32(_mm256_set1_epi32(int(bytes)), shifts);
        }
    }
}

// 64 codes of six bits, out of a plane of four bits and one of two.
inline void unpack_six(const uint8_t* fours, const uint8_t* twos, Ints* codes) {
    const Ints pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(fours)), nibble = _mm256_set1_epi8(0x0F);
    const Ints even = _mm256_and_si256(pairs, nibble), odd = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble);
    Ints upper[2];  // bits 4 and 5 of 32 codes each: four codes of a byte move apart in a lane
    for (int half = 0; half < 2; ++half) {
        Ints bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(twos + 8 * half)));
        bits = _mm256_or_si256(bits, _mm256_slli_epi32(bits, 12));
        bits = _mm256_or_si256(bits, _mm256_slli_epi32(bits, 6));
        upper[half] = _mm256_and_si256(_mm256_slli_epi32(bits, 4), _mm256_set1_epi8(0x30));
    }
    // Interleaving keeps to halves of a vector: codes 0-15 and 32-47, then the others.
    const Ints first = _mm256_or_si256(_mm256_unpacklo_epi8(even, odd), _mm256_permute2x128_si256(upper[0], upper[1], 0x20));
    const Ints last = _mm256_or_si256(_mm256_unpackhi_epi8(even, odd), _mm256_permute2x128_si256(upper[0], upper[1], 0x31));
    const __m128i quarters[4] = {_mm256_castsi256_si128(first), _mm256_castsi256_si128(last), _mm256_extracti128_si256(first, 1),
                                 _mm256_extracti128_si256(last, 1)};
    for (int q = 0; q < 4; ++q) {
        codes[2 * q] = _mm256_cvtepu8_epi32(quarters[q]);
        codes[2 * q + 1] = _mm256_cvtepu8_epi32(_mm_srli_si128(quarters[q], LANES));
    }
}

// Look-ups

inline Floats gather(const float* table, Ints index) { return _mm256_i32gather_ps(table, index, 4); }

// A code book of up to 16 values in two registers. vpermps reads the low three bits of an index; bit 3 picks the register.
constexpr bool SCALES_BOOK = true;
struct Book {
    Floats low, high;
};
inline Book book(const float* values) { return {load(values), load(values + 8)}; }
inline Book rescale(Book b, float scale) {
    const Floats s = broadcast(scale);
    return {multiply(b.low, s), multiply(b.high, s)};
}
inline Book rescale(Book b, float zero, float scale, float minimum) {
    const Floats z = broadcast(zero), s = broadcast(scale), m = broadcast(minimum);
    return {subtract(multiply(subtract(b.low, z), s), m), subtract(multiply(subtract(b.high, z), s), m)};
}
template <int BITS>
inline Floats look_up(Book b, Ints codes) {
    const Floats low = _mm256_permutevar8x32_ps(b.low, codes);
    if constexpr (BITS <= 3) {
        return low;
    } else {
        const Floats high = _mm256_permutevar8x32_ps(b.high, codes);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    }
}

// The factors of vector `v` of a chunk, from one number per PIECE columns.
template <int PIECE>
inline Floats spread(const float* pieces, int v) { return broadcast(pieces[v * LANES / PIECE]); }

// Small floats

inline Floats load_half(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline __m128i half_codes(Floats a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store_half(uint16_t* to, Floats a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half_codes(a)); }
inline Floats round_half(Floats a) { return _mm256_cvtph_ps(half_codes(a)); }

// (code - offset) * its unit for 64 codes of six bits, eight of which share an fp16 unit.
#define QUANTLIB_HAS_SIX
typedef Floats SixNumbers;
inline SixNumbers six_numbers(float offset) { return broadcast(offset); }
inline void read_six_run(const uint8_t* fours, const uint8_t* twos, const uint8_t* units, SixNumbers offset, float* to) {
    Ints codes[8];
    float unit[8];
    unpack_six(fours, twos, codes);
    store(unit, load_half(reinterpret_cast<const uint16_t*>(units)));
    for (int v = 0; v < 8; ++v) store(to + v * LANES, multiply(subtract(number(codes[v]), offset), broadcast(unit[v])));
}
inline Floats load_bfloat(const uint16_t* from) {
    const Ints words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
// The nearest codes.
inline Ints bfloat_codes(Floats a) {
    const Ints bits = _mm256_castps_si256(a);
    const Ints even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const Ints words = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7FFF))), 16);
    const Ints nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(words, _mm256_set1_epi32(0x7FC0), nan);
}
inline Floats round_bfloat(Floats a) { return _mm256_castsi256_ps(_mm256_slli_epi32(bfloat_codes(a), 16)); }
inline void store_bfloat(uint16_t* to, Floats a) {
    const Ints words = bfloat_codes(a);
    const Ints packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

// E4M3's bits, put into fp16's places, are the value times 2^-8, subnormals included; 0x7F and 0xFF are NaN.
inline Floats load_e4m3(const uint8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i top = _mm_set1_epi16(0x3F80);
    // Sign extension leaves a second copy of the sign in bit 14; the mask takes it out.
    __m128i half = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7), _mm_set1_epi16(short(0xBF80)));
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(half, top), top);
    half = _mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7E00)));
    return multiply(_mm256_cvtph_ps(half), broadcast(256.0f));
}
// E5M2 is the upper byte of an fp16.
inline Floats load_e5m2(const uint8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 8));
}

// Comparing and rounding, for choosing codes. Where one operand is NaN, minimum and maximum give the second.

typedef Floats Mask;
inline Ints as_ints(Floats a) { return _mm256_castps_si256(a); }
inline Floats as_floats(Ints a) { return _mm256_castsi256_ps(a); }
inline Ints broadcast_int(int32_t value) { return _mm256_set1_epi32(value); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
// The bits above come in as zeros.
inline Ints shift_right(Ints a, int bits) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(bits)); }
inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Mask less(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Mask equal(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline Mask less(Ints a, Ints b) { return as_floats(_mm256_cmpgt_epi32(b, a)); }
inline Floats pick(Mask which, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, which); }
inline Ints pick(Mask which, Ints yes, Ints no) { return as_ints(pick(which, as_floats(yes), as_floats(no))); }
inline Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline float least_lane(Floats a) {
    __m128 half = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_min_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
}
inline float greatest_lane(Floats a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
// To the nearest integer, ties to even.
inline Floats round_even(Floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Whole numbers within int32 -> integers.
inline Ints integer(Floats a) { return _mm256_cvttps_epi32(a); }
// The low byte of every lane.
inline void store_bytes(uint8_t* to, Ints a) {
    const Ints bytes = _mm256_and_si256(a, _mm256_set1_epi32(0xFF));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}

// How many of 15 ascending bounds (of 16 numbers; the last is not read) lie below a number: none below NaN.
struct Ladder {
    const float* bounds;
};
inline Ladder ladder(const float* bounds) { return {bounds}; }
inline Ints rank(Ladder l, Floats x) {
    Ints found = _mm256_setzero_si256();
    for (int i = 0; i < 15; ++i) found = subtract(found, as_ints(less(_mm256_broadcast_ss(l.bounds + i), x)));
    return found;
}

}  // namespace quantlib::cpu::avx2

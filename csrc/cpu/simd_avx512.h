// The AVX-512 spelling (F, BW, VL, DQ): sixteen lanes. simd_pairs.h goes on where BF16 and VBMI are there too.
#pragma once

#include <immintrin.h>

namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int LANES = 16;
typedef __m512 Floats;
typedef __m512i Ints;

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }
inline float sum(Floats a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// Integers

inline Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
template <int BITS>
inline Ints shift_left(Ints a) { return _mm512_slli_epi32(a, BITS); }
template <int BITS>
inline Ints clean(Ints a) { return _mm512_and_si512(a, _mm512_set1_epi32((1 << BITS) - 1)); }
inline Floats number(Ints a) { return _mm512_cvtepi32_ps(a); }

// CHUNK codes of one plane; the bits above a code are those of its neighbours.
template <int WIDTH>
inline void unpack(const uint8_t* from, Ints* codes) {
    if constexpr (WIDTH == 8) {
        codes[0] = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        codes[1] = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16)));
    } else if constexpr (WIDTH == 4) {
        // Sixteen codes are 64 bits, too many for one lane to shift down: interleave low and high nibbles as bytes first.
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        const __m128i high = _mm_srli_epi16(bytes, 4);
        codes[0] = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, high));
        codes[1] = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(bytes, high));
    } else {
        const Ints counts = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const Ints shifts = _mm512_slli_epi32(counts, WIDTH - 1);
        for (int v = 0; v < 2; ++v) {
            uint32_t bytes = 0;
            memcpy(&bytes, from + v * 2 * WIDTH, 2 * WIDTH);
            codes[v] = _mm512_srlv_epi32(_mm512_set1_epi32(int(bytes)), shifts);
        }
    }
}

QUANTLIB_INLINE Ints load_ints(const void* from) { return _mm512_loadu_si512(from); }
QUANTLIB_INLINE void store_ints(void* to, Ints a) { _mm512_storeu_si512(to, a); }

// A square of 32-bit lanes, turned over its diagonal.
#define QUANTLIB_HAS_TRANSPOSE
inline void transpose(Ints (&a)[LANES]) {
    Ints b[LANES];
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // Quarter q of a[4s + j] holds rows 4s ... 4s + 3 of column 4q + j: whole quarters remain to be exchanged.
    for (int j = 0; j < 4; ++j) {
        const Ints even_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xDD);
        const Ints even_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const Ints odd_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xDD);
        b[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        b[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        b[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
        b[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
    }
    for (int i = 0; i < LANES; ++i) a[i] = b[i];
}

// Look-ups

inline Floats gather(const float* table, Ints index) { return _mm512_i32gather_ps(index, table, 4); }

// A code book of up to 16 values in one register; vpermps reads the low four bits of an index and ignores the others.
constexpr bool SCALES_BOOK = true;
struct Book {
    Floats values;
};
inline Book book(const float* values) { return {load(values)}; }
inline Book rescale(Book b, float scale) { return {multiply(b.values, broadcast(scale))}; }
inline Book rescale(Book b, float zero, float scale, float minimum) {
    return {subtract(multiply(subtract(b.values, broadcast(zero)), broadcast(scale)), broadcast(minimum))};
}
template <int BITS>
inline Floats look_up(Book b, Ints codes) { return _mm512_permutexvar_ps(codes, b.values); }

// The factors of vector `v` of a chunk, from one number per PIECE columns.
template <int PIECE>
inline Floats spread(const float* pieces, int v) {
    if constexpr (PIECE >= LANES) {
        return broadcast(pieces[v * LANES / PIECE]);
    } else {
        return _mm512_mask_broadcastss_ps(broadcast(pieces[2 * v]), 0xFF00, _mm_load_ss(pieces + 2 * v + 1));
    }
}

// Small floats

inline Floats load_half(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __m256i half_codes(Floats a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store_half(uint16_t* to, Floats a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half_codes(a)); }
inline Floats round_half(Floats a) { return _mm512_cvtph_ps(half_codes(a)); }

inline Floats load_bfloat(const uint16_t* from) {
    const Ints words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
// The nearest codes. vcvtneps2bf16 would be one instruction, but it flushes subnormals to zero.
inline Ints bfloat_codes(Floats a) {
    const Ints bits = _mm512_castps_si512(a);
    const Ints even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const Ints words = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7FFF))), 16);
    return _mm512_mask_mov_epi32(words, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
}
inline void store_bfloat(uint16_t* to, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bfloat_codes(a)));
}
inline Floats round_bfloat(Floats a) { return _mm512_castsi512_ps(_mm512_slli_epi32(bfloat_codes(a), 16)); }

// E4M3's bits, put into fp16's places, are the value times 2^-8, subnormals included; 0x7F and 0xFF are NaN.
inline Floats load_e4m3(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i top = _mm256_set1_epi16(0x3F80);
    // Sign extension leaves a second copy of the sign in bit 14; the mask takes it out.
    __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), _mm256_set1_epi16(short(0xBF80)));
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, top), top);
    half = _mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7E00)));
    return multiply(_mm512_cvtph_ps(half), broadcast(256.0f));
}
// E5M2 is the upper byte of an fp16.
inline Floats load_e5m2(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
}

// Comparing and rounding, for choosing codes. Where one operand is NaN, minimum and maximum give the second.

typedef __mmask16 Mask;
inline Ints as_ints(Floats a) { return _mm512_castps_si512(a); }
inline Floats as_floats(Ints a) { return _mm512_castsi512_ps(a); }
inline Ints broadcast_int(int32_t value) { return _mm512_set1_epi32(value); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Mask both(Mask a, Mask b) { return _kand_mask16(a, b); }
// The bits above come in as zeros.
inline Ints shift_right(Ints a, int bits) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits)); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask(a, b); }
inline Floats pick(Mask which, Floats yes, Floats no) { return _mm512_mask_blend_ps(which, no, yes); }
inline Ints pick(Mask which, Ints yes, Ints no) { return _mm512_mask_blend_epi32(which, no, yes); }
inline Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline float least_lane(Floats a) { return _mm512_reduce_min_ps(a); }
inline float greatest_lane(Floats a) { return _mm512_reduce_max_ps(a); }
// To the nearest integer, ties to even.
inline Floats round_even(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Whole numbers within int32 -> integers.
inline Ints integer(Floats a) { return _mm512_cvttps_epi32(a); }
// The low byte of every lane.
inline void store_bytes(uint8_t* to, Ints a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a));
}

// How many of 15 ascending bounds (of 16 numbers; the last decides nothing) lie below a number: none below NaN. A binary search
// whose steps are look-ups: `by[s]` holds at i the bound that decides whether i becomes i + 2^s.
struct Ladder {
    Floats middle, by[3];
};
inline Ladder ladder(const float* bounds) {
    float shifted[3][16] = {};
    for (int s = 0; s < 3; ++s) memcpy(shifted[s], bounds + (1 << s) - 1, (17 - (1 << s)) * sizeof(float));
    return {broadcast(bounds[7]), {load(shifted[0]), load(shifted[1]), load(shifted[2])}};
}
inline Ints rank(const Ladder& l, Floats x) {
    Ints found = _mm512_maskz_set1_epi32(less(l.middle, x), 8);
    found = _mm512_mask_add_epi32(found, less(_mm512_permutexvar_ps(found, l.by[2]), x), found, _mm512_set1_epi32(4));
    found = _mm512_mask_add_epi32(found, less(_mm512_permutexvar_ps(found, l.by[1]), x), found, _mm512_set1_epi32(2));
    return _mm512_mask_add_epi32(found, less(_mm512_permutexvar_ps(found, l.by[0]), x), found, _mm512_set1_epi32(1));
}

#if QUANTLIB_ISA_LEVEL == 2  // simd_vbmi.h has a faster way
#define QUANTLIB_HAS_SIX
// 64 codes of six bits, out of a plane of four bits and one of two.
inline void unpack_six(const uint8_t* fours, const uint8_t* twos, Ints* codes) {
    const Ints pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(fours)));
    const Ints lower = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(0x0F));
    // Four codes of a byte move apart in a lane.
    Ints bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(twos)));
    bits = _mm512_or_si512(bits, _mm512_slli_epi32(bits, 12));
    bits = _mm512_or_si512(bits, _mm512_slli_epi32(bits, 6));
    const Ints upper = _mm512_and_si512(_mm512_slli_epi32(bits, 4), _mm512_set1_epi8(0x30));
    const Ints bytes = _mm512_or_si512(lower, upper);
    codes[0] = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(bytes));
    codes[1] = _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 1));
    codes[2] = _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 2));
    codes[3] = _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 3));
}

// (code - offset) * its unit for 64 codes of six bits, eight of which share an fp16 unit.
typedef Floats SixNumbers;
inline SixNumbers six_numbers(float offset) { return broadcast(offset); }
inline void read_six_run(const uint8_t* fours, const uint8_t* twos, const uint8_t* units, SixNumbers offset, float* to) {
    Ints codes[4];
    unpack_six(fours, twos, codes);
    const Floats unit = _mm512_castps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(units))));
    Ints index = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    for (int v = 0; v < 4; ++v, index = _mm512_add_epi32(index, _mm512_set1_epi32(2))) {
        store(to + v * LANES, multiply(subtract(number(codes[v]), offset), _mm512_permutexvar_ps(index, unit)));
    }
}
#endif

}  // namespace quantlib::cpu::QUANTLIB_ISA

// Words of 16 bits and products of bf16 pairs: what AVX-512 BF16 and VBMI add to simd_avx512.h. Only the instruction set that
// has them includes this file.
//
// dot() adds the two products of each lane's pair in fp32. Inputs and sums below 2^-126 count as zero there.
#pragma once

#include "simd.h"

#if QUANTLIB_ISA_LEVEL >= 3
#define QUANTLIB_HAS_PAIRS

namespace quantlib::cpu::QUANTLIB_ISA {

typedef __m512i Words;  // 32 words of 16 bits
constexpr int WORDS = 32;

QUANTLIB_INLINE Words load_words(const void* from) { return _mm512_loadu_si512(from); }
// The same, into a register: the compiler would load again what it could keep.
QUANTLIB_INLINE Words load_once(const void* from) {
    Words a = load_words(from);
    __asm__("" : "+v"(a));
    return a;
}
QUANTLIB_INLINE void store_words(void* to, Words a) { _mm512_storeu_si512(to, a); }
QUANTLIB_INLINE Floats dot(Floats sum, Words a, Words b) { return _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b)); }
QUANTLIB_INLINE Floats negative_multiply_add(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
// Four and eight numbers, again and again.
QUANTLIB_INLINE Floats four_numbers(const float* from) { return _mm512_broadcast_f32x4(_mm_loadu_ps(from)); }
QUANTLIB_INLINE Floats eight_numbers(const float* from) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(from)); }
// The first `count` numbers, at most LANES; zeros behind them.
QUANTLIB_INLINE Floats load_first(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(__mmask16(count >= LANES ? 0xFFFF : (1 << count) - 1), from);
}
QUANTLIB_INLINE Floats permute(Ints index, Floats a) { return _mm512_permutexvar_ps(index, a); }

// `a` where the mask has ones, `b` elsewhere.
QUANTLIB_INLINE Words choose(Words mask, Words a, Words b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xCA); }
QUANTLIB_INLINE Words same_words(int word) { return _mm512_set1_epi16(short(word)); }

// Left for positive, right for negative; bits that leave a word are lost.
template <int BITS>
QUANTLIB_INLINE Words shift_words(Words a) {
    if constexpr (BITS > 0) return _mm512_slli_epi16(a, BITS);
    if constexpr (BITS < 0) return _mm512_srli_epi16(a, -BITS);
    return a;
}

// Every lane of 32 bits holds the two words at an address.
QUANTLIB_INLINE Words same_pairs(const uint16_t* from) {
    int pair;
    memcpy(&pair, from, 4);
    return _mm512_set1_epi32(pair);
}
// Words of a and b by turns, a's first: of each run of eight words, the first four and the last four.
QUANTLIB_INLINE Words low_pairs(Words a, Words b) { return _mm512_unpacklo_epi16(a, b); }
QUANTLIB_INLINE Words high_pairs(Words a, Words b) { return _mm512_unpackhi_epi16(a, b); }

// fp32 in lanes of 32 bits whose words are two bf16: the low one, the high one.
QUANTLIB_INLINE Floats low_floats(Words pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
QUANTLIB_INLINE Floats high_floats(Words pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000u))));
}

// fp32 -> bf16, nearest even, numbers below 2^-126 as zero: words 0-15 from `first`, 16-31 from `second`.
QUANTLIB_INLINE Words round_words(Floats first, Floats second) { return Words(_mm512_cvtne2ps_pbh(second, first)); }

// Lanes whose low word is the upper word of a lane of a, and whose high word is that of b.
QUANTLIB_INLINE Floats upper_words(Floats a, Floats b) {
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a), 16), _mm512_castps_si512(b)));
}
// Store numbers as bf16, nearest even, numbers below 2^-126 as zero; returns what was stored.
QUANTLIB_INLINE Floats store_rounded(void* to, Floats a) {
    const __m256i words = __m256i(_mm512_cvtneps_pbh(a));
    _mm256_storeu_si256(static_cast<__m256i*>(to), words);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// The sum of each of four vectors.
QUANTLIB_INLINE __m128 four_sums(Floats a, Floats b, Floats c, Floats d) {
    const Floats ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const Floats cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const Floats all = add(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// A code book of bf16 numbers for codes of BITS bits; look_up ignores the bits above a code.
template <int BITS>
struct WordBook {
    static constexpr int VECTORS = BITS <= 5 ? 1 : 2;
    static_assert(BITS <= 6);
    Words entries[VECTORS];
    explicit WordBook(const uint16_t* values) {
        for (int v = 0; v < VECTORS; ++v) entries[v] = load_words(values + v * WORDS);
    }
    QUANTLIB_INLINE Words look_up(Words codes) const {
        if constexpr (VECTORS == 1) return _mm512_permutexvar_epi16(codes, entries[0]);
        return _mm512_permutex2var_epi16(entries[0], codes, entries[VECTORS - 1]);
    }
};

// Low and high bytes of words -> the words of even places, and of odd ones.
QUANTLIB_INLINE void join_bytes(Words lows, Words highs, Words& even, Words& odd) {
    const Words mask = same_words(0x00FF);
    even = choose(mask, lows, shift_words<8>(highs));
    odd = choose(mask, shift_words<-8>(lows), highs);
}

// The same for 8 bits: the low and the high bytes of 256 numbers, looked up byte by byte.
struct ByteBook {
    Words low[4], high[4];
    explicit ByteBook(const uint16_t* values) {
        uint8_t bytes[2][256];
        for (int i = 0; i < 256; ++i) {
            bytes[0][i] = uint8_t(values[i]);
            bytes[1][i] = uint8_t(values[i] >> 8);
        }
        for (int v = 0; v < 4; ++v) {
            low[v] = load_words(bytes[0] + v * 64);
            high[v] = load_words(bytes[1] + v * 64);
        }
    }
    // Two words of codes, low byte first -> the numbers of the low bytes and of the high bytes.
    QUANTLIB_INLINE void look_up(Words codes, Words& even, Words& odd) const {
        const __mmask64 upper = _mm512_movepi8_mask(codes);
        const Words lows = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(low[0], codes, low[1]),
                                                  _mm512_permutex2var_epi8(low[2], codes, low[3]));
        const Words highs = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(high[0], codes, high[1]),
                                                   _mm512_permutex2var_epi8(high[2], codes, high[3]));
        join_bytes(lows, highs, even, odd);
    }
};

// Codes of 4, 2, 1 and 8 bits out of memory, of a span that is stored whole; those of 8 bits from column `column` on.
struct WholeSpan {
    QUANTLIB_INLINE Words load_nibbles(const uint8_t* from) const { return load_words(from); }
    QUANTLIB_INLINE Words load_bytes(const uint8_t* from, int64_t) const { return load_words(from); }
    QUANTLIB_INLINE Floats permute_numbers(Ints index, Floats a) const { return permute(index, a); }
    QUANTLIB_INLINE Words keep_words(Words a) const { return a; }
    QUANTLIB_INLINE __m256i load_pairs(const uint8_t* from) const {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    QUANTLIB_INLINE __m128i load_bits(const uint8_t* from) const {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
};

// Of a span whose first `columns` columns are stored: no byte behind them is read, zeros stand there.
struct PartSpan {
    int64_t columns;
    QUANTLIB_INLINE Words load_nibbles(const uint8_t* from) const { return load_first(from, (columns + 1) / 2); }
    QUANTLIB_INLINE Words load_bytes(const uint8_t* from, int64_t column) const { return load_first(from, columns - column); }
    QUANTLIB_INLINE __m256i load_pairs(const uint8_t* from) const {
        return _mm256_maskz_loadu_epi8(__mmask32(first((columns + 3) / 4)), from);
    }
    QUANTLIB_INLINE __m128i load_bits(const uint8_t* from) const {
        return _mm_maskz_loadu_epi8(__mmask16(first((columns + 7) / 8)), from);
    }
    // Numbers of lanes of eight columns, and words of columns 4w + turn; zeros behind the stored ones.
    QUANTLIB_INLINE Floats permute_numbers(Ints index, Floats a) const {
        return _mm512_maskz_permutexvar_ps(__mmask16(first((columns + 7) / 8)), index, a);
    }
    QUANTLIB_INLINE Words keep_words(Words a) const {
        return _mm512_maskz_mov_epi16(__mmask32(first((columns + 3) / 4)), a);
    }

  private:
    static QUANTLIB_INLINE Words load_first(const uint8_t* from, int64_t count) {
        return _mm512_maskz_loadu_epi8(first(count), from);
    }
    static QUANTLIB_INLINE __mmask64 first(int64_t count) {
        return count <= 0 ? 0 : count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1;
    }
};

// Words of one plane of codes of WIDTH bits, 128 codes: word w holds codes 4w ... 4w + 3 from bit 0 up, and what comes above
// them means nothing.
template <int WIDTH, class Stored>
QUANTLIB_INLINE Words load_plane(const Stored& stored, const uint8_t* from) {
    if constexpr (WIDTH == 4) return stored.load_nibbles(from);
    if constexpr (WIDTH == 2) return _mm512_cvtepu8_epi16(stored.load_pairs(from));
    const Words bytes = _mm512_cvtepu8_epi32(stored.load_bits(from));
    return _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
}

// The same of eight columns of sixteen rows that lie side by side (strips.h): two words of each row.
template <int WIDTH>
QUANTLIB_INLINE Words strip_plane(const uint8_t* plane, int64_t eighth, int64_t ahead) {
    constexpr int HELD = 4 / WIDTH;  // times eight columns in 32 bits
    const uint8_t* from = plane + eighth / HELD * sizeof(Words);
    fetch_once(from + ahead);
    const Words words = load_once(from);
    if constexpr (WIDTH == 4) return words;
    // The lane's bytes that hold the columns; the first in its low word, the last in its high word.
    const int byte = int(eighth % HELD) * WIDTH;
    const int low = byte, high = byte + (WIDTH == 2);
    const Words lanes = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C));
    const Words bytes = _mm512_set1_epi32(int(0x80008000u) | low | high << 16);
    const Words spread = _mm512_shuffle_epi8(words, _mm512_add_epi8(bytes, lanes));
    return WIDTH == 2 ? spread : _mm512_srlv_epi16(spread, _mm512_set1_epi32(4 << 16));
}

// 128 bytes -> the words (4w, 4w + 1) in `first`, (4w + 2, 4w + 3) in `second`.
template <class Stored>
QUANTLIB_INLINE void load_byte_plane(const Stored& stored, const uint8_t* from, Words& first, Words& second) {
    const Words a = stored.load_bytes(from, 0), b = stored.load_bytes(from + 64, 64);
    const Words even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20,
                                        18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    first = _mm512_permutex2var_epi16(a, even, b);
    second = _mm512_permutex2var_epi16(a, _mm512_or_si512(even, same_words(1)), b);
}

// Of each of sixteen runs of eight words the words `first` and `first + apart`.
QUANTLIB_INLINE Words pick_pairs(const uint16_t* from, int first, int apart) {
    const Words lanes = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 0, 8, 16, 24, 32, 40, 48, 56);
    const Words low = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
    const Words index = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(apart)), 16));
    const Words lower = _mm512_permutex2var_epi16(load_words(from), index, load_words(from + WORDS));
    const Words upper = _mm512_permutex2var_epi16(load_words(from + 2 * WORDS), index, load_words(from + 3 * WORDS));
    return _mm512_mask_blend_epi16(0xFFFF0000u, lower, upper);
}
// Words 4w + turn of 128 words in natural order, for w = 0 ... 31: the order in which codes leave their planes.
QUANTLIB_INLINE Words every_fourth(const uint16_t* from, int turn) { return pick_pairs(from, turn, 4); }

// Words of even places first, then those of odd places.
QUANTLIB_INLINE Words part_words(Words a) {
    const Words index = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22, 20, 18,
                                         16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutexvar_epi16(index, a);
}
// The way back.
QUANTLIB_INLINE Words mix_words(Words a) {
    const Words index = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(index, a);
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

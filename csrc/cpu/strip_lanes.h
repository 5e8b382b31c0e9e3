// Bytes of sixteen rows of a strip -> numbers in fp32, [number][row], so that a vector is one number of every row.
#pragma once

#include "strips.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

// Where the bytes of a kind of number of each row of a strip begin, behind the last row's the last again; or, of those that lie in
// strips, the first words of all rows.
struct StripRows {
    const uint8_t* row[STRIP];
    const uint8_t* words = nullptr;
    int64_t rows = STRIP, ahead = 0;
    static StripRows of(const uint8_t* first, int64_t row_bytes, int64_t rows) {
        StripRows all;
        for (int r = 0; r < STRIP; ++r) all.row[r] = first + least(r, rows - 1) * row_bytes;
        return all;
    }
    // `ahead`: bytes between what is read and what is asked for.
    static StripRows of_words(const uint8_t* words, int64_t rows, int64_t ahead) {
        StripRows all;
        all.words = words, all.rows = rows, all.ahead = ahead;
        return all;
    }
    // COUNT words of every row from byte `at` on, of which `bytes` are there; zeros behind them.
    template <int COUNT>
    QUANTLIB_INLINE void read_words(int64_t at, int64_t bytes, Ints (&out)[COUNT]) const {
        const uint8_t* from = words + at * rows;
        const __mmask16 there = __mmask16((1 << rows) - 1);
        for (int w = 0; w < COUNT; ++w) {
            const bool read = w * WORD_BYTES < bytes;
            if (read) fetch_near(from + ahead);
            out[w] = read ? _mm512_maskz_loadu_epi32(there, from) : _mm512_setzero_si512();
            from += rows * WORD_BYTES;
        }
    }
};

// 16 bytes of each row, of which `bytes` are there -> four vectors of 32 bits of every row.
QUANTLIB_INLINE void read_quarter(const StripRows& from, int64_t at, int64_t bytes, Ints (&out)[4]) {
    if (from.words != nullptr) return from.read_words(at, bytes, out);
    const __mmask16 there = bytes >= 16 ? __mmask16(0xFFFF) : __mmask16((1 << bytes) - 1);
    Ints rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const auto quarter = [&](int r) QUANTLIB_LAMBDA { return _mm_maskz_loadu_epi8(there, from.row[r] + at); };
        rows[i] = _mm512_castsi128_si512(quarter(i));
        rows[i] = _mm512_inserti32x4(rows[i], quarter(4 + i), 1);
        rows[i] = _mm512_inserti32x4(rows[i], quarter(8 + i), 2);
        rows[i] = _mm512_inserti32x4(rows[i], quarter(12 + i), 3);
    }
    const Ints a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const Ints c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    out[0] = _mm512_unpacklo_epi64(a, c), out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d), out[3] = _mm512_unpackhi_epi64(b, d);
}

// 64 bytes of each row, of which `bytes` are there -> sixteen vectors of 32 bits of every row.
QUANTLIB_INLINE void read_square(const StripRows& from, int64_t at, int64_t bytes, Ints (&out)[LANES]) {
    if (from.words != nullptr) return from.read_words(at, bytes, out);
    const __mmask64 there = bytes >= 64 ? ~__mmask64(0) : (__mmask64(1) << bytes) - 1;
    for (int r = 0; r < STRIP; ++r) out[r] = _mm512_maskz_loadu_epi8(there, from.row[r] + at);
    transpose(out);
}

// Lines of codes to ask for while numbers are read, for else memory would be idle: one at a time.
struct Meanwhile {
    const uint8_t* line;
    QUANTLIB_INLINE void ask() {
        fetch_once(line);
        line += 64;
    }
};

template <int VECTORS_READ, int SIZE, class Convert>
QUANTLIB_INLINE void read_runs(const StripRows& from, int64_t first, int64_t count, Meanwhile meanwhile, float* to, Convert convert) {
    constexpr int HELD = WORD_BYTES / SIZE;
    for (int64_t i = 0; i < count; i += VECTORS_READ * HELD) {
        Ints words[VECTORS_READ];
        const int64_t at = (first + i) * SIZE, bytes = (count - i) * SIZE;
        if constexpr (VECTORS_READ == 4) read_quarter(from, at, bytes, words);
        if constexpr (VECTORS_READ == LANES) read_square(from, at, bytes, words);
        for (int w = 0; w < VECTORS_READ && i + w * HELD < count; ++w) {
            Floats numbers[HELD];
            meanwhile.ask();
            convert(words[w], numbers);
            for (int h = 0; h < HELD; ++h) store(to + (i + w * HELD + h) * STRIP, numbers[h]);
        }
    }
}
// `count` numbers of SIZE bytes from number `first` on, [count][STRIP] in fp32: convert(32 bits of every row, numbers) makes those that
// 32 bits hold. `to` has room for three more.
template <int SIZE, class Convert>
QUANTLIB_INLINE void read_lanes(const StripRows& from, int64_t first, int64_t count, Meanwhile meanwhile, float* to, Convert convert) {
    if (count * SIZE <= 32) return read_runs<4, SIZE>(from, first, count, meanwhile, to, convert);
    read_runs<LANES, SIZE>(from, first, count, meanwhile, to, convert);
}

template <DType D>
inline void read_number_lanes(const StripRows& from, int64_t first, int64_t count, Meanwhile meanwhile, float* to) {
    read_lanes<item_size(D)>(from, first, count, meanwhile, to, [](Ints words, auto& numbers) QUANTLIB_LAMBDA {
        if constexpr (D == DType::float32) {
            numbers[0] = _mm512_castsi512_ps(words);
        } else if constexpr (D == DType::bfloat16) {
            numbers[0] = low_floats(words), numbers[1] = high_floats(words);
        } else {
            numbers[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
            numbers[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
        }
    });
}

// Byte `BYTE` of each lane, as an integer.
template <int BYTE>
QUANTLIB_INLINE Ints lane_byte(Ints words) {
    return BYTE == 3 ? _mm512_srli_epi32(words, 24) : _mm512_and_si512(_mm512_srli_epi32(words, 8 * BYTE), _mm512_set1_epi32(0xFF));
}

// 2^(byte - 127); 255 is no number.
QUANTLIB_INLINE Floats power_of(Ints bytes) {
    const Ints zero_code = _mm512_set1_epi32(1 << 22), none = _mm512_set1_epi32(0x7FC00000);  // 2^-127 is subnormal
    Ints bits = _mm512_slli_epi32(bytes, 23);
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(bytes, _mm512_setzero_si512()), zero_code);
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(bytes, _mm512_set1_epi32(255)), none);
    return _mm512_castsi512_ps(bits);
}

inline void read_e4m3_lanes(const StripRows& from, int64_t first, int64_t count, float factor, Meanwhile meanwhile, float* to) {
    const Floats scale = broadcast(factor);
    read_lanes<1>(from, first, count, meanwhile, to, [=](Ints codes, Floats (&numbers)[4]) QUANTLIB_LAMBDA {
        Ints lows, highs, even, odd;  // the latter: of codes 0 and 2 of each lane, of 1 and 3
        e4m3_halves(codes, lows, highs);
        join_bytes(lows, highs, even, odd);
        numbers[0] = multiply(low_floats(even), scale), numbers[1] = multiply(low_floats(odd), scale);
        numbers[2] = multiply(high_floats(even), scale), numbers[3] = multiply(high_floats(odd), scale);
    });
}

template <class Convert>
inline void read_byte_lanes(const StripRows& from, int64_t first, int64_t count, Meanwhile meanwhile, float* to, Convert convert) {
    read_lanes<1>(from, first, count, meanwhile, to, [=](Ints codes, Floats (&numbers)[4]) QUANTLIB_LAMBDA {
        numbers[0] = convert(lane_byte<0>(codes)), numbers[1] = convert(lane_byte<1>(codes));
        numbers[2] = convert(lane_byte<2>(codes)), numbers[3] = convert(lane_byte<3>(codes));
    });
}

// Scales of scales, eight codes of every row at a time: 32 bits of a plane of four bits hold eight, those of two bits sixteen.
template <int BITS>
struct SuperCodes {
    static_assert(BITS == 4 || BITS == 6 || BITS == 8);
    static constexpr int WIDTH = PLANE_WIDTHS[BITS][0], CODES = 32 / WIDTH;  // of the first plane
    // 64 codes from code `first` on, of which `count` are there; a row has `across`.
    SuperCodes(const StripRows& from, int64_t across, int64_t first, int64_t count) {
        for (int q = 0; q < QUARTERS; ++q) {
            Ints quarter[4];
            read_quarter(from, first * WIDTH / 8 + q * 16, most(0, count * WIDTH / 8 - q * 16), quarter);
            for (int i = 0; i < 4; ++i) low[4 * q + i] = quarter[i];
        }
        if constexpr (BITS == 6) read_quarter(from, across / 2 + first / 4, count / 4, high);
    }
    // Codes 8 * `eight` ... as integers of 32 bits.
    QUANTLIB_INLINE void eight(int eight, Ints (&codes)[8]) const {
        if constexpr (BITS == 8) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) codes[i] = field(low[2 * eight + i / 4], 8 * (i % 4), 0xFF);
        } else if constexpr (BITS == 4) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) codes[i] = field(low[eight], 4 * i, 0x0F);
        } else {
            // Bytes of even and of odd codes, their upper two bits four places up: the window of eight bits that begins four before.
            const Ints nibbles = low[eight], mask = _mm512_set1_epi8(0x0F);
            const Ints pairs = eight % 2 == 0 ? high[eight / 2] : _mm512_srli_epi32(high[eight / 2], 16);
            const Ints even_bits = _mm512_set1_epi64(0x2824201C0804003C), odd_bits = _mm512_set1_epi64(0x2A26221E0A06023E);
            const Ints even = _mm512_ternarylogic_epi32(mask, nibbles, _mm512_multishift_epi64_epi8(even_bits, pairs), 0xCA);
            const Ints odd = _mm512_ternarylogic_epi32(mask, _mm512_srli_epi32(nibbles, 4),
                                                       _mm512_multishift_epi64_epi8(odd_bits, pairs), 0xCA);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) codes[2 * i] = field(even, 8 * i, 0x3F), codes[2 * i + 1] = field(odd, 8 * i, 0x3F);
        }
    }

  private:
    static constexpr int QUARTERS = 64 / CODES / 4;
    Ints low[4 * QUARTERS], high[4];
    static QUANTLIB_INLINE Ints field(Ints words, int bit, int mask) {
        return _mm512_and_si512(_mm512_srli_epi32(words, bit), _mm512_set1_epi32(mask));
    }
};

// `count` numbers from `first` on, both multiples of COUNT and of eight, [count][STRIP] in fp32: (code - offset) * unit. COUNT share a
// unit, of fp16.
template <int BITS, int COUNT>
inline void read_super_lanes(const StripRows& from, const StripRows& unit_rows, int64_t across, float offset, int64_t first, int64_t count,
                             Meanwhile meanwhile, float* to) {
    const Floats less = broadcast(offset);
    const bool whole = offset == 0.0f;
    for (int64_t i = 0; i < count; i += 64, first += 64, to += 64 * STRIP) {
        const int64_t there = least(64, count - i);
        const SuperCodes<BITS> codes(from, across, first, there);
        Ints units[4];
        read_quarter(unit_rows, first / COUNT * 2, there / COUNT * 2, units);
        for (int e = 0; e < there / 8; ++e) {
            const int u = e * 8 / COUNT;
            const Ints halves = u % 2 == 0 ? units[u / 2] : _mm512_srli_epi32(units[u / 2], 16);
            const Floats unit = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(halves));
            Ints eight[8];
            codes.eight(e, eight);
            meanwhile.ask();
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                const Floats code = number(eight[j]);
                store(to + (e * 8 + j) * STRIP, multiply(whole ? code : subtract(code, less), unit));
            }
        }
    }
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

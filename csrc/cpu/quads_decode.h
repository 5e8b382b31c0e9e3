// From packed codes to fp32, QUADS columns at a time, for AVX2. A lane of 32 bits stands for four neighbouring columns:
//
//     group g (0, 1), vector t (0 .. 3): lane 4h + j holds column 32h + 16g + 4j + t        h, g: which 16 columns; j: lane of a half
//
// so that lanes 4h .. 4h + 3 of a group are 16 neighbouring columns, which share a scale in every format with blocks of 16 columns
// and more. The order is what bytes of codes become when they are unpacked to words and words to numbers: nothing is repacked.
#pragma once

#include "scales.h"

#if QUANTLIB_ISA_LEVEL == 1
#define QUANTLIB_HAS_QUADS
#define QUANTLIB_INLINE inline __attribute__((always_inline))
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int QUADS = 64;      // columns
constexpr int GROUP_TURNS = 4;  // vectors of a group

// Bytes between what is decoded and what is asked for: what arrives meanwhile must not be waited for.
constexpr int64_t FETCH_AHEAD = 1536;
QUANTLIB_INLINE void fetch(const uint8_t* address) {
    _mm_prefetch(reinterpret_cast<const char*>(address + FETCH_AHEAD), _MM_HINT_T0);
}

inline int64_t quads_of(int64_t columns) { return (columns + QUADS - 1) / QUADS; }

QUANTLIB_INLINE Ints load_bytes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
QUANTLIB_INLINE Ints load_twice(const uint8_t* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
QUANTLIB_INLINE Ints bytes(int value) { return _mm256_set1_epi8(char(value)); }
QUANTLIB_INLINE Ints words(int value) { return _mm256_set1_epi16(short(value)); }
template <int G>
QUANTLIB_INLINE Ints interleave_bytes(Ints low, Ints high) {
    return G == 0 ? _mm256_unpacklo_epi8(low, high) : _mm256_unpackhi_epi8(low, high);
}

// 64 codes as bytes: byte i of `even` is column 2i, of `odd` column 2i + 1. Bits above a code's planes are zero.
struct CodeBytes {
    Ints even, odd;
};

QUANTLIB_INLINE CodeBytes plane_bytes(const uint8_t* from, int width) {
    if (width == 4) {
        const Ints both_halves = load_bytes(from);
        return {_mm256_and_si256(both_halves, bytes(0x0F)), _mm256_and_si256(_mm256_srli_epi16(both_halves, 4), bytes(0x0F))};
    }
    if (width == 2) {  // byte b: columns 4b .. 4b + 3; bytes 2i and 2i + 1 of the result come from byte i of the half
        const Ints index = _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7,  //
                                            8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
        const Ints twice = _mm256_shuffle_epi8(load_twice(from), index);
        const Ints high = _mm256_srli_epi16(twice, 4);
        const Ints low_byte = words(0x0003), high_byte = words(0x0300);
        const auto pick_bits = [&](Ints first, Ints second) {
            return _mm256_or_si256(_mm256_and_si256(first, low_byte), _mm256_and_si256(second, high_byte));
        };
        return {pick_bits(twice, high), pick_bits(_mm256_srli_epi16(twice, 2), _mm256_srli_epi16(high, 2))};
    }
    // width 1: byte b holds columns 8b .. 8b + 7
    uint64_t bits;
    memcpy(&bits, from, 8);
    const Ints index = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,  //
                                        4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
    const Ints spread_bits = _mm256_shuffle_epi8(_mm256_set1_epi64x(int64_t(bits)), index);
    const auto test = [&](int mask) {
        const Ints wanted = _mm256_set1_epi32(mask);
        return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread_bits, wanted), wanted), bytes(1));
    };
    return {test(0x40100401), test(int(0x80200802u))};
}

template <int BITS>
QUANTLIB_INLINE CodeBytes code_bytes(const Planes& planes, int64_t span) {
    constexpr int FIRST = PLANE_WIDTHS[BITS][0], SECOND = PLANE_WIDTHS[BITS][1], THIRD = PLANE_WIDTHS[BITS][2];
    const auto plane = [&](int number, int width) {
        const uint8_t* from = planes.plane[number] + span * (QUADS * width / 8);
        fetch(from);
        return plane_bytes(from, width);
    };
    CodeBytes codes = plane(0, FIRST);
    if constexpr (SECOND != 0) {
        const CodeBytes high = plane(1, SECOND);
        codes.even = either(codes.even, _mm256_slli_epi16(high.even, FIRST));
        codes.odd = either(codes.odd, _mm256_slli_epi16(high.odd, FIRST));
    }
    if constexpr (THIRD != 0) {
        const CodeBytes high = plane(2, THIRD);
        codes.even = either(codes.even, _mm256_slli_epi16(high.even, FIRST + SECOND));
        codes.odd = either(codes.odd, _mm256_slli_epi16(high.odd, FIRST + SECOND));
    }
    return codes;
}

// Decoders. `load` fetches a span of 64 columns, `numbers<G>` makes the four vectors of a group of it.

// Up to 4 bits, entries that are bf16 numbers: their two bytes are looked up, and stand in the upper half of a lane in turn.
template <int BITS>
struct WordLookUp {
    Ints low, high;
    struct Loaded {
        Ints low_even, high_even, low_odd, high_odd;
    };
    explicit WordLookUp(const Plan& plan) {
        uint8_t lows[16], highs[16];
        for (int i = 0; i < 16; ++i) lows[i] = uint8_t(plan.pairs[i]), highs[i] = uint8_t(plan.pairs[i] >> 8);
        low = load_twice(lows), high = load_twice(highs);
    }
    QUANTLIB_INLINE Loaded load(const Planes& planes, int64_t span) const {
        const CodeBytes codes = code_bytes<BITS>(planes, span);
        return {_mm256_shuffle_epi8(low, codes.even), _mm256_shuffle_epi8(high, codes.even),
                _mm256_shuffle_epi8(low, codes.odd), _mm256_shuffle_epi8(high, codes.odd)};
    }
    template <int G>
    QUANTLIB_INLINE void numbers(const Loaded& from, Floats (&w)[GROUP_TURNS]) const {
        const Ints even = interleave_bytes<G>(from.low_even, from.high_even);
        const Ints odd = interleave_bytes<G>(from.low_odd, from.high_odd), upper = _mm256_set1_epi32(int(0xFFFF0000u));
        w[0] = as_floats(_mm256_slli_epi32(even, 16)), w[1] = as_floats(_mm256_slli_epi32(odd, 16));
        w[2] = as_floats(_mm256_and_si256(even, upper)), w[3] = as_floats(_mm256_and_si256(odd, upper));
    }
    QUANTLIB_INLINE bool damaged() const { return false; }
};

// Up to 4 bits, entries in fp32: four bytes are looked up.
template <int BITS>
struct FloatLookUp {
    Ints tables[4];
    struct Loaded {
        Ints even[4], odd[4];
    };
    explicit FloatLookUp(const Plan& plan) {
        for (int b = 0; b < 4; ++b) {
            uint8_t entries[16];
            for (int i = 0; i < 16; ++i) memcpy(entries + i, reinterpret_cast<const uint8_t*>(plan.values + i) + b, 1);
            tables[b] = load_twice(entries);
        }
    }
    QUANTLIB_INLINE Loaded load(const Planes& planes, int64_t span) const {
        const CodeBytes codes = code_bytes<BITS>(planes, span);
        Loaded found;
        for (int b = 0; b < 4; ++b) {
            found.even[b] = _mm256_shuffle_epi8(tables[b], codes.even);
            found.odd[b] = _mm256_shuffle_epi8(tables[b], codes.odd);
        }
        return found;
    }
    template <int G>
    QUANTLIB_INLINE void numbers(const Loaded& from, Floats (&w)[GROUP_TURNS]) const {
        const auto both_of = [](const Ints (&parts)[4], Floats& first, Floats& second) {
            const Ints low = interleave_bytes<G>(parts[0], parts[1]), high = interleave_bytes<G>(parts[2], parts[3]);
            first = as_floats(_mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xAA));
            second = as_floats(_mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xAA));
        };
        both_of(from.even, w[0], w[2]);
        both_of(from.odd, w[1], w[3]);
    }
    QUANTLIB_INLINE bool damaged() const { return false; }
};

// Codes of more bits as bytes in the order of columns: group g's lanes are 16 columns of either half.
struct ByteGroups {
    Ints group[2];
};

template <int BITS>
QUANTLIB_INLINE ByteGroups byte_groups(const Planes& planes, int64_t span) {
    if constexpr (BITS == 8) {
        const uint8_t* from = planes.plane[0] + span * QUADS;
        fetch(from);
        const auto halves = [&](int g) {
            const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * g));
            const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 32 + 16 * g));
            return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        };
        return {{halves(0), halves(1)}};
    } else {
        const CodeBytes codes = code_bytes<BITS>(planes, span);
        return {{interleave_bytes<0>(codes.even, codes.odd), interleave_bytes<1>(codes.even, codes.odd)}};
    }
}

// Byte t of every lane, signed, as a number.
template <int T>
QUANTLIB_INLINE Floats signed_byte(Ints lanes) {
    return number(_mm256_srai_epi32(T == 3 ? lanes : _mm256_slli_epi32(lanes, 24 - 8 * T), 24));
}

// Integers of 5 to 8 bits: code - offset fits a signed byte.
template <int BITS>
struct SignedBytes {
    using Loaded = ByteGroups;
    Ints offset;
    explicit SignedBytes(const Plan& plan) : offset(bytes(int(plan.offset))) {}
    QUANTLIB_INLINE Loaded load(const Planes& planes, int64_t span) const {
        ByteGroups found = byte_groups<BITS>(planes, span);
        for (Ints& group : found.group) group = _mm256_sub_epi8(group, offset);
        return found;
    }
    template <int G>
    QUANTLIB_INLINE void numbers(const Loaded& from, Floats (&w)[GROUP_TURNS]) const {
        const Ints lanes = from.group[G];
        w[0] = signed_byte<0>(lanes), w[1] = signed_byte<1>(lanes), w[2] = signed_byte<2>(lanes), w[3] = signed_byte<3>(lanes);
    }
    QUANTLIB_INLINE bool damaged() const { return false; }
};

// Integers of 8 bits without an offset.
struct UnsignedBytes {
    using Loaded = ByteGroups;
    explicit UnsignedBytes(const Plan&) {}
    QUANTLIB_INLINE Loaded load(const Planes& planes, int64_t span) const { return byte_groups<8>(planes, span); }
    template <int G>
    QUANTLIB_INLINE void numbers(const Loaded& from, Floats (&w)[GROUP_TURNS]) const {
        const Ints lanes = from.group[G];
        for (int t = 0; t < GROUP_TURNS; ++t) w[t] = number(clean<8>(shift_right(lanes, 8 * t)));
    }
    QUANTLIB_INLINE bool damaged() const { return false; }
};

// E4M3 and E5M2: sign and magnitude in fp32's places are the number times a power of two, subnormals included. Codes that are no
// numbers are counted, and make the row's results NaN.
struct FloatBytes {
    using Loaded = ByteGroups;
    Ints mask, infinite;
    __m128i down;
    Floats factor;
    mutable Ints found = _mm256_setzero_si256();

    explicit FloatBytes(const Plan& plan) {
        const bool e4m3 = plan.codec == CodecKind::e4m3;
        down = _mm_cvtsi32_si128(e4m3 ? 4 : 3);
        mask = _mm256_set1_epi32(int(e4m3 ? 0x87F00000u : 0x8FE00000u));
        factor = broadcast(e4m3 ? 0x1p120f : 0x1p112f);
        infinite = bytes(e4m3 ? 0x7E : 0x7B);  // the largest magnitude that is a number
    }
    QUANTLIB_INLINE Loaded load(const Planes& planes, int64_t span) const {
        const ByteGroups loaded = byte_groups<8>(planes, span);
        for (const Ints& group : loaded.group) {
            found = either(found, _mm256_cmpgt_epi8(_mm256_and_si256(group, bytes(0x7F)), infinite));
        }
        return loaded;
    }
    template <int T>
    QUANTLIB_INLINE Floats number_of(Ints lanes) const {
        const Ints top = T == 3 ? lanes : _mm256_slli_epi32(lanes, 24 - 8 * T);
        return multiply(as_floats(_mm256_and_si256(_mm256_sra_epi32(top, down), mask)), factor);
    }
    template <int G>
    QUANTLIB_INLINE void numbers(const Loaded& from, Floats (&w)[GROUP_TURNS]) const {
        const Ints lanes = from.group[G];
        w[0] = number_of<0>(lanes), w[1] = number_of<1>(lanes), w[2] = number_of<2>(lanes), w[3] = number_of<3>(lanes);
    }
    // Whether such a code was met since the last question.
    QUANTLIB_INLINE bool damaged() const {
        const bool any = !_mm256_testz_si256(found, found);
        found = _mm256_setzero_si256();
        return any;
    }
};

// Whether bf16 holds every entry.
inline bool entries_are_words(const Plan& plan) {
    for (int i = 0; i < 256; ++i) {
        const uint32_t bits = uint32_t(plan.pairs[i]) << 16;
        if (memcmp(&bits, plan.values + i, 4) != 0) return false;
    }
    return true;
}

template <class Type>
struct As {
    using type = Type;
};

// Call `with` the decoder of a plan's codes, for x of a dtype.
template <class With>
inline void with_quads(const Plan& plan, DType dtype, With with) {
    if (plan.codec == CodecKind::e4m3 || plan.codec == CodecKind::e5m2) return with(As<FloatBytes>());
    const bool in_words = dtype == DType::bfloat16 || entries_are_words(plan);
    switch (plan.bits) {
        case 2: return in_words ? with(As<WordLookUp<2>>()) : with(As<FloatLookUp<2>>());
        case 3: return in_words ? with(As<WordLookUp<3>>()) : with(As<FloatLookUp<3>>());
        case 4: return in_words ? with(As<WordLookUp<4>>()) : with(As<FloatLookUp<4>>());
        case 5: return with(As<SignedBytes<5>>());
        case 6: return with(As<SignedBytes<6>>());
        default: return plan.offset == 0.0f ? with(As<UnsignedBytes>()) : with(As<SignedBytes<8>>());
    }
}

// How a row's numbers, one per `piece` columns (8 to 128), are spread over the lanes of a span's two groups. One vector serves
// both where a piece covers 32 columns.
class QuadSpread {
  public:
    explicit QuadSpread(int piece) : log_piece_(__builtin_ctz(piece)) {
        const Ints lane = _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3);
        if (piece >= 32) {
            const int second = piece == 32 ? 1 : 0;
            first_ = second_ = _mm256_setr_epi32(0, 0, 0, 0, second, second, second, second);
        } else {
            first_ = piece == 16 ? _mm256_setzero_si256() : _mm256_srli_epi32(lane, 1);
            second_ = _mm256_add_epi32(first_, _mm256_set1_epi32(piece == 16 ? 1 : 2));
        }
    }
    template <bool NARROW>
    QUANTLIB_INLINE void operator()(const float* pieces, int64_t span, Floats (&out)[2]) const {
        const float* from = pieces + (span * QUADS >> log_piece_);
        if constexpr (NARROW) {
            const __m128 low = _mm_loadu_ps(from), high = _mm_loadu_ps(from + (QUADS / 2 >> log_piece_));
            const Floats all = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
            out[0] = _mm256_permutevar_ps(all, first_), out[1] = _mm256_permutevar_ps(all, second_);
        } else {
            const Floats all = _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(from)));
            out[0] = out[1] = _mm256_permutevar_ps(all, first_);
        }
    }

  private:
    int log_piece_;
    Ints first_, second_;
};

using QuadsRow = SpanRow<QUADS>;

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

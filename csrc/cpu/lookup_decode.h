// From packed codes to fp32 numbers for AVX2, 64 columns (a span) at a time, without a scale: vectors 0-3 and 4-7 are its halves.
//
//     codes of up to 7 bits   bytes of even columns and bytes of odd ones; byte look-ups give the bytes of bf16 or fp32 numbers,
//                             unpacking puts them side by side: lane l of the vectors of a half holds four neighbouring columns,
//                             16h + 4l ... of half h for l < 4, 32 + 16h + 4(l - 4) ... for the others
//     codes of 8 bits         half h holds columns 32h ... 32h + 31
//
// x is brought into the same order once per call (lookup_x.h), so nothing is repacked.
#pragma once

#include "rows.h"
#include "simd_lookup.h"

#ifdef QUANTLIB_HAS_LOOKUP
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int SPAN = 64;
constexpr int SPAN_VECTORS = SPAN / LANES, HALF = SPAN_VECTORS / 2;

inline int64_t spans_of(int64_t columns) { return (columns + SPAN - 1) / SPAN; }

// Columns of one span whose codes lie in bytes: those of even and of odd places.
struct ByteCodes {
    Ints even, odd;
};

// Codes of BITS bits, of one to three planes; what lies `ahead` bytes further on is asked for.
template <int BITS>
QUANTLIB_INLINE ByteCodes byte_codes(const Planes& planes, int64_t span, int64_t ahead) {
    constexpr int FIRST = PLANE_WIDTHS[BITS][0], SECOND = PLANE_WIDTHS[BITS][1], THIRD = PLANE_WIDTHS[BITS][2];
    const uint8_t* first = planes.plane[0] + span * (SPAN * FIRST / 8);
    fetch_near(first + ahead);
    const Ints low = load_twos<FIRST>(first);
    ByteCodes codes = {place<0, 0, FIRST>(low), place<FIRST, 0, FIRST>(low)};
    if constexpr (SECOND != 0) {
        const uint8_t* second = planes.plane[1] + span * (SPAN * SECOND / 8);
        fetch_near(second + ahead);
        const Ints high = load_twos<SECOND>(second);
        codes.even = either(codes.even, place<0, FIRST, SECOND>(high));
        codes.odd = either(codes.odd, place<SECOND, FIRST, SECOND>(high));
    }
    if constexpr (THIRD != 0) {
        const uint8_t* third = planes.plane[2] + span * (SPAN * THIRD / 8);
        fetch_near(third + ahead);
        const Ints top = load_twos<THIRD>(third);
        codes.even = either(codes.even, place<0, FIRST + SECOND, THIRD>(top));
        codes.odd = either(codes.odd, place<THIRD, FIRST + SECOND, THIRD>(top));
    }
    return codes;
}

// Four vectors from bytes of even (turn 0) or odd (turn 1) columns whose bf16 numbers have these low and high bytes.
template <class Take>
QUANTLIB_INLINE void take_words(Ints low, Ints high, int turn, Take& take) {
    const Ints first = low_words(low, high);
    take(turn, low_floats(first));
    take(turn + 2, high_floats(first));
    const Ints last = high_words(low, high);
    take(HALF + turn, low_floats(last));
    take(HALF + turn + 2, high_floats(last));
}

// What every decoder has: numbers(), which gives vectors to take(vector, numbers) one by one, vector 0 of each half before its
// others, so that few registers are in use; unit, by which its numbers are too small; BYTES, whether codes have 8 bits; column(),
// its order; start() and damaged(), which watch for codes that are no numbers. IN_PLACE, offset and place(): lookup_place.h.
struct Decoder {
    static constexpr bool BYTES = false, IN_PLACE = false;
    static constexpr float offset = 0, unit = 1;
    static int column(int vector, int lane) { return lane / 4 * 32 + vector / HALF * 16 + lane % 4 * 4 + vector % HALF; }
    static int place(int) { return 0; }
    QUANTLIB_INLINE Ints start() const { return _mm256_setzero_si256(); }
    static inline bool damaged(Ints) { return false; }
};

// Entries of a code book as bf16, rounded where bf16 doesn't hold them.
template <int BITS>
struct WordBook : Decoder {
    Ints low, high;
    explicit WordBook(const Plan& plan) {
        uint8_t bytes[2][16];
        for (int i = 0; i < 16; ++i) bytes[0][i] = uint8_t(plan.pairs[i]), bytes[1][i] = uint8_t(plan.pairs[i] >> 8);
        low = byte_table(bytes[0]), high = byte_table(bytes[1]);
    }
    template <class Take>
    QUANTLIB_INLINE void numbers(const Planes& planes, int64_t span, int64_t ahead, Ints&, Take take) const {
        const ByteCodes codes = byte_codes<BITS>(planes, span, ahead);
        take_words(look_up_bytes(low, codes.even), look_up_bytes(high, codes.even), 0, take);
        take_words(look_up_bytes(low, codes.odd), look_up_bytes(high, codes.odd), 1, take);
    }
};

// Entries of a code book in fp32.
template <int BITS>
struct FloatBook : Decoder {
    Ints bytes[4];
    explicit FloatBook(const Plan& plan) {
        for (int byte = 0; byte < 4; ++byte) {
            uint8_t table[16];
            for (int i = 0; i < 16; ++i) memcpy(table + i, reinterpret_cast<const uint8_t*>(plan.values + i) + byte, 1);
            bytes[byte] = byte_table(table);
        }
    }
    template <class Take>
    QUANTLIB_INLINE void look_up(Ints codes, int turn, Take& take) const {
        const Ints b0 = look_up_bytes(bytes[0], codes), b1 = look_up_bytes(bytes[1], codes);
        const Ints b2 = look_up_bytes(bytes[2], codes), b3 = look_up_bytes(bytes[3], codes);
        const Ints first = low_words(b2, b3), first_rest = low_words(b0, b1);
        take(turn, low_floats(first, first_rest));
        take(turn + 2, high_floats(first, first_rest));
        const Ints last = high_words(b2, b3), last_rest = high_words(b0, b1);
        take(HALF + turn, low_floats(last, last_rest));
        take(HALF + turn + 2, high_floats(last, last_rest));
    }
    template <class Take>
    QUANTLIB_INLINE void numbers(const Planes& planes, int64_t span, int64_t ahead, Ints&, Take take) const {
        const ByteCodes codes = byte_codes<BITS>(planes, span, ahead);
        look_up(codes.even, 0, take);
        look_up(codes.odd, 1, take);
    }
};

// Integers of 5 to 7 bits: 0x43 above a byte u < 128 is the bf16 number 128 + u.
template <int BITS>
struct Integers : Decoder {
    Floats bias;
    explicit Integers(const Plan& plan) : bias(broadcast(128 + plan.offset)) {}
    template <class Take>
    QUANTLIB_INLINE void numbers(const Planes& planes, int64_t span, int64_t ahead, Ints&, Take take) const {
        const ByteCodes codes = byte_codes<BITS>(planes, span, ahead);
        auto take_difference = [&](int v, Floats number) QUANTLIB_LAMBDA { take(v, subtract(number, bias)); };
        take_words(codes.even, same_bytes(0x43), 0, take_difference);
        take_words(codes.odd, same_bytes(0x43), 1, take_difference);
    }
};

// Integers of 8 bits: 0x4B0000 above a byte u is the fp32 number 2^23 + u.
struct Bytes : Decoder {
    static constexpr bool BYTES = true;
    Floats bias;
    explicit Bytes(const Plan& plan) : bias(broadcast(8388608 + plan.offset)) {}
    static int column(int vector, int lane) { return vector / HALF * 32 + lane / 4 * 16 + vector % HALF * 4 + lane % 4; }
    template <class Take>
    QUANTLIB_INLINE void numbers(const Planes& planes, int64_t span, int64_t ahead, Ints&, Take take) const {
        const uint8_t* from = planes.plane[0] + span * SPAN;
        fetch_near(from + ahead);
        const Ints zeros = _mm256_setzero_si256(), exponent = _mm256_set1_epi16(0x4B00);
        for (int half = 0; half < 2; ++half) {
            const Ints bytes = load_bytes(from + half * 32);
            const Ints words[2] = {low_words(bytes, zeros), high_words(bytes, zeros)};
            for (int i = 0; i < 2; ++i) {
                const int v = half * HALF + 2 * i;
                take(v, subtract(_mm256_castsi256_ps(_mm256_unpacklo_epi16(words[i], exponent)), bias));
                take(v + 1, subtract(_mm256_castsi256_ps(_mm256_unpackhi_epi16(words[i], exponent)), bias));
            }
        }
    }
};

// Floats of 8 bits by way of fp16; columns come in their own order, eight to a vector, the middle two vectors of a half swapped.
template <bool E4M3>
struct SmallFloats : Decoder {
    static constexpr bool BYTES = true;
    static constexpr float unit = E4M3 ? 256 : 1;  // E4M3's bits in fp16's places are the value times 2^-8
    explicit SmallFloats(const Plan&) {}
    static int column(int vector, int lane) { return vector / HALF * 32 + vector % 2 * 16 + vector % HALF / 2 * 8 + lane; }

    template <class Take>
    QUANTLIB_INLINE static void take_halves(Ints words, int vector, Take& take) {
        if constexpr (E4M3) {
            // Shifting leaves a second copy of the sign in bit 14; the mask takes it out.
            words = _mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16(short(0xBF80)));
        }
        take(vector, _mm256_cvtph_ps(_mm256_castsi256_si128(words)));
        take(vector + 1, _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1)));
    }
    template <class Take>
    QUANTLIB_INLINE void numbers(const Planes& planes, int64_t span, int64_t ahead, Ints& seen, Take take) const {
        const uint8_t* from = planes.plane[0] + span * SPAN;
        fetch_near(from + ahead);
        const Ints zeros = _mm256_setzero_si256();
        for (int half = 0; half < 2; ++half) {
            const Ints bytes = load_bytes(from + half * 32);
            take_halves(low_words(zeros, bytes), half * HALF, take);
            take_halves(high_words(zeros, bytes), half * HALF + 2, take);
            if constexpr (E4M3) seen = _mm256_max_epu8(seen, _mm256_add_epi8(bytes, bytes));
        }
    }
    // E4M3's two NaN are the codes whose double, in a byte, is 0xFE.
    static inline bool damaged(Ints seen) {
        return E4M3 && _mm256_movemask_epi8(_mm256_cmpeq_epi8(seen, same_bytes(0xFE))) != 0;
    }
};

// How numbers, one per plan.span_piece or 64 columns, are spread over the lanes of a half.
enum class Spread {
    span,  // a span has one
    both,  // several, the same for both halves
    each,  // one to four for each half
};

template <Spread SPREAD>
struct SpanLanes {
    static constexpr Spread spread = SPREAD;
    static constexpr bool SAME = SPREAD != Spread::each;  // for both halves
    int64_t count;     // numbers per span
    int64_t doubling;  // 1 where a number serves two spans
    Ints first, last;

    SpanLanes(const Plan& plan, bool grouped)
        : count(plan.span_piece < SPAN ? SPAN / plan.span_piece : 1), doubling(plan.span_piece / SPAN / 2) {
        const auto pattern = [](int low, int high) { return _mm256_setr_epi32(low, low, low, low, high, high, high, high); };
        if (plan.bits == 8) {
            first = pattern(0, 0), last = pattern(1, 1);
        } else {
            const Ints pairs = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
            first = count == 2 ? pattern(0, 1) : grouped ? pairs : pattern(0, 2);
            last = pattern(1, 3);
        }
    }
    // Numbers of the lanes of both halves of a span.
    QUANTLIB_INLINE void operator()(const float* pieces, int64_t span, Floats (&out)[2]) const {
        if constexpr (SPREAD == Spread::span) {
            out[0] = out[1] = broadcast(pieces[span >> doubling]);
        } else {
            const Floats four = load_four(pieces + span * count);
            out[0] = pick_lanes(four, first);
            out[1] = SAME ? out[0] : pick_lanes(four, last);
        }
    }
};

using LookupRow = SpanRow<SPAN>;

template <class Codes, class SpanLanes, class With>
inline void with_shift(const Plan& plan, const Codes& codes, const SpanLanes& lanes, With with) {
    switch (shift_of(plan)) {
        case Shift::none: return with(codes, lanes, Shifted<Shift::none>());
        case Shift::zero: return with(codes, lanes, Shifted<Shift::zero>());
        case Shift::minimum: return with(codes, lanes, Shifted<Shift::minimum>());
    }
}

template <class Codes, class With>
inline void with_lanes(const Plan& plan, const Codes& codes, With with) {
    constexpr bool GROUPED = Codes::IN_PLACE;
    if (plan.span_piece >= SPAN) return with_shift(plan, codes, SpanLanes<Spread::span>(plan, GROUPED), with);
    if constexpr (!Codes::BYTES) {
        if (GROUPED || plan.span_piece == SPAN / 2) {
            return with_shift(plan, codes, SpanLanes<Spread::both>(plan, GROUPED), with);
        }
    }
    if constexpr (!GROUPED) with_shift(plan, codes, SpanLanes<Spread::each>(plan, GROUPED), with);
}

inline bool books_hold_bf16(const Plan& plan) {
    for (int i = 0; i < 1 << plan.bits; ++i) {
        uint32_t bits;
        memcpy(&bits, plan.values + i, 4);
        if ((bits & 0xFFFF) != 0) return false;
    }
    return true;
}

template <int BITS, class With>
inline void with_book(const Plan& plan, bool rounded, With with) {
    if (rounded || books_hold_bf16(plan)) return with_lanes(plan, WordBook<BITS>(plan), with);
    with_lanes(plan, FloatBook<BITS>(plan), with);
}

template <class With>
inline void with_floats(const Plan& plan, With with) {
    if (plan.codec == CodecKind::e4m3) return with_lanes(plan, SmallFloats<true>(plan), with);
    with_lanes(plan, SmallFloats<false>(plan), with);
}

// Call `with` a decoder for this plan's codes, how its numbers lie over lanes, and what is subtracted. `rounded`: code books
// may be rounded to bf16.
template <class With>
inline void with_lookup(const Plan& plan, bool rounded, With with) {
    switch (plan.bits) {
        case 2: return with_book<2>(plan, rounded, with);
        case 3: return with_book<3>(plan, rounded, with);
        case 4: return with_book<4>(plan, rounded, with);
        case 5: return with_lanes(plan, Integers<5>(plan), with);
        case 6: return with_lanes(plan, Integers<6>(plan), with);
        case 7: return with_lanes(plan, Integers<7>(plan), with);
        default: return plan.codec == CodecKind::affine ? with_lanes(plan, Bytes(plan), with) : with_floats(plan, with);
    }
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

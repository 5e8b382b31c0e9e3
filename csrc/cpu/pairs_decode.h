// From packed codes to bf16 numbers, SPAN columns at a time: vector `turn` of a span holds columns 4w + turn in words w = 0 ... 31.
// A lane of 32 bits, over the four vectors, holds eight neighbouring columns; they share a scale in every format with blocks of a
// multiple of eight columns, so that a scale can wait until a lane's products have been added.
#pragma once

#include "rows.h"
#include "simd_pairs.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int SPAN = 128;
constexpr int TURNS = SPAN / WORDS;

inline int64_t spans_of(int64_t columns) { return (columns + SPAN - 1) / SPAN; }

// Codes of one or two planes that are not bytes: entries of a code book in registers.
template <int BITS, class Book = WordBook<BITS>>
struct BookCodes {
    static constexpr int FIRST = PLANE_WIDTHS[BITS][0], SECOND = PLANE_WIDTHS[BITS][1];
    static_assert(PLANE_WIDTHS[BITS][2] == 0);
    const Book book;
    explicit BookCodes(const Plan& plan) : book(plan.pairs) {}

    static constexpr int STAGES = TURNS;  // steps in which a span's words come out, in order
    struct Raw {
        Words first, second;
    };

    template <class Stored>
    QUANTLIB_INLINE Raw raw(const Stored& stored, const Planes& planes, int64_t span, int64_t ahead = FETCH_AHEAD) const {
        const uint8_t* low = planes.plane[0] + span * (SPAN * FIRST / 8);
        fetch_once(low + ahead);
        Raw codes;
        codes.first = codes.second = load_plane<FIRST>(stored, low);
        if constexpr (SECOND != 0) {
            const uint8_t* high = planes.plane[1] + span * (SPAN * SECOND / 8);
            fetch_once(high + ahead);
            codes.second = load_plane<SECOND>(stored, high);
        }
        return codes;
    }
    // Of eight columns of each row of a strip (strips.h).
    QUANTLIB_INLINE Raw raw_of_strip(const Planes& planes, int64_t eighth, int64_t ahead) const {
        Raw codes;
        codes.first = codes.second = strip_plane<FIRST>(planes.plane[0], eighth, ahead);
        if constexpr (SECOND != 0) codes.second = strip_plane<SECOND>(planes.plane[1], eighth, ahead);
        return codes;
    }
    template <int STAGE>
    QUANTLIB_INLINE void stage(const Raw& raw, Words* out) const {
        Words codes = shift_words<-FIRST * STAGE>(raw.first);
        if constexpr (SECOND != 0) {
            codes = choose(same_words((1 << FIRST) - 1), codes, shift_words<FIRST - SECOND * STAGE>(raw.second));
        }
        out[0] = book.look_up(codes);
    }
};

struct ByteCodes {
    const ByteBook book;
    explicit ByteCodes(const Plan& plan) : book(plan.pairs) {}

    static constexpr int STAGES = 2;
    struct Raw {
        Words half[STAGES];
    };

    template <class Stored>
    QUANTLIB_INLINE Raw raw(const Stored& stored, const Planes& planes, int64_t span, int64_t ahead = FETCH_AHEAD) const {
        const uint8_t* bytes = planes.plane[0] + span * SPAN;
        fetch_once(bytes + ahead);
        fetch_once(bytes + ahead + 64);
        Raw codes;
        load_byte_plane(stored, bytes, codes.half[0], codes.half[1]);
        return codes;
    }
    QUANTLIB_INLINE Raw raw_of_strip(const Planes& planes, int64_t eighth, int64_t ahead) const {
        const uint8_t* bytes = planes.plane[0] + eighth * (2 * sizeof(Words));
        fetch_once(bytes + ahead);
        fetch_once(bytes + ahead + sizeof(Words));
        return {{load_words(bytes), load_words(bytes + sizeof(Words))}};
    }
    template <int STAGE>
    QUANTLIB_INLINE void stage(const Raw& raw, Words* out) const {
        book.look_up(raw.half[STAGE], out[0], out[1]);
    }
};

// Stages STAGE and following of a span.
template <int STAGE = 0, class Codes>
QUANTLIB_INLINE void look_up_stages(const Codes& codes, const typename Codes::Raw& raw, Words* out) {
    codes.template stage<STAGE>(raw, out + STAGE * (TURNS / Codes::STAGES));
    if constexpr (STAGE + 1 < Codes::STAGES) look_up_stages<STAGE + 1>(codes, raw, out);
}

// The numbers of a span's codes.
template <class Codes, class Stored>
QUANTLIB_INLINE void look_up_span(const Codes& codes, const Stored& stored, const Planes& planes, int64_t span, Words* out,
                                  int64_t ahead = FETCH_AHEAD) {
    look_up_stages(codes, codes.raw(stored, planes, span, ahead), out);
}

// How a row's numbers, one per `plan.span_piece` columns, are spread over the lanes of a span.
class Spread {
  public:
    explicit Spread(const Plan& plan) : count_(SPAN / plan.span_piece) {
        const Ints lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        index_ = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(__builtin_ctz(plan.span_piece / 8)));
    }
    // Lane l has the number of columns 8l ... 8l + 7 of a span.
    // Zero behind the stored columns, where `pieces` go on with what belongs to another row.
    template <class Stored>
    QUANTLIB_INLINE Floats operator()(const Stored& stored, const float* pieces, int64_t span) const {
        const float* from = pieces + span * count_;
        // Loads no wider than needed: most of 64 bytes would lie in two cache lines.
        return stored.permute_numbers(index_, count_ <= 4 ? four_numbers(from) : count_ == 8 ? eight_numbers(from) : load(from));
    }

  private:
    int64_t count_;
    Ints index_;
};

// One weight row: codes in whole spans, then those of a part of one.
class PairsRow {
  public:
    PairsRow(const Plan& plan, const Parts& parts, int64_t row)
        : bits_(plan.bits),
          columns_(plan.padded_k),
          planes_(planes_of(plan.bits, parts.codes + row * (plan.padded_k * plan.bits / 8), plan.padded_k)) {}
    int64_t whole() const { return columns_ / SPAN; }
    const Planes& planes() const { return planes_; }
    Planes planes(int64_t span) const { return moved(bits_, planes_, span * (SPAN / CHUNK)); }
    Planes tail() const { return planes(whole()); }
    PartSpan part() const { return {columns_ % SPAN}; }

  private:
    const int bits_;
    const int64_t columns_;
    const Planes planes_;
};

template <class With>
inline void with_codes(const Plan& plan, With with) {
    switch (plan.bits) {
        case 2: return with(BookCodes<2>(plan));
        case 3: return with(BookCodes<3>(plan));
        case 4: return with(BookCodes<4>(plan));
        case 5: return with(BookCodes<5>(plan));
        case 6: return with(BookCodes<6>(plan));
        default: return with(ByteCodes(plan));
    }
}

// Call `with` a decoder for this plan's codes, and what is subtracted from them.
template <class With>
inline void with_decoder(const Plan& plan, With with) {
    switch (shift_of(plan)) {
        case Shift::none: return with_codes(plan, [&](const auto& codes) { with(codes, Shifted<Shift::none>()); });
        case Shift::zero: return with_codes(plan, [&](const auto& codes) { with(codes, Shifted<Shift::zero>()); });
        case Shift::minimum: return with_codes(plan, [&](const auto& codes) { with(codes, Shifted<Shift::minimum>()); });
    }
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

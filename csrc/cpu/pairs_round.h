// From packed codes to bf16 weights, for kernels that multiply many rows: the law in fp32, rounded once.
//
// Two ways to the same bits. Where the code books of all blocks in a span fit two registers, each entry goes through the law and is
// rounded, once per block, and codes are looked up with their block's number above them. Elsewhere numbers are looked up and go
// through the law one by one; fp32 takes a vector of words apart into even and odd ones, so that words come out PARTED.
#pragma once

#include "pairs_decode.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

template <Shift SHIFT, class Codes>
class LawDecoder {
  public:
    explicit LawDecoder(const Plan& plan) : codes_(plan), spread_(plan) {}

    static constexpr int STAGES = Codes::STAGES;  // steps in which a span's weights come out, in order
    static constexpr int WIDTH = TURNS / STAGES;  // vectors of a step
    struct State {
        typename Codes::Raw codes;
        Floats scale, shift;
    };

    // What the weights of one span of a row are made of; `planes` count spans from `span - index`.
    template <class Stored>
    QUANTLIB_INLINE State begin(const Stored& stored, const Planes& planes, const RowNumbers& numbers, int64_t span,
                                int64_t index, int64_t ahead) const {
        State state;
        state.codes = codes_.raw(stored, planes, index, ahead);
        state.scale = spread_(stored, numbers.scale, span);
        state.shift = zero();
        if constexpr (SHIFT == Shift::zero) state.shift = spread_(stored, numbers.zero, span);
        if constexpr (SHIFT == Shift::minimum) state.shift = spread_(stored, numbers.minimum, span);
        return state;
    }
    template <int STAGE, class Stored>
    QUANTLIB_INLINE void stage(const Stored&, const State& state, Words* out) const {
        codes_.template stage<STAGE>(state.codes, out);
        for (int v = 0; v < WIDTH; ++v) {
            const Floats even = scaled<SHIFT>(low_floats(out[v]), state.scale, state.shift);
            const Floats odd = scaled<SHIFT>(high_floats(out[v]), state.scale, state.shift);
            out[v] = round_words(even, odd);
        }
    }

  private:
    const Codes codes_;
    const Spread spread_;
};

// In place of a book: codes as they are, with bits above them that mean nothing.
template <int BITS>
struct NoBook {
    explicit NoBook(const uint16_t*) {}
    QUANTLIB_INLINE Words look_up(Words codes) const { return codes; }
};

constexpr int BOOK_ENTRIES = 2 * WORDS;  // of all blocks in a span
// Whether the books of `groups` blocks fit.
constexpr bool books_fit(int bits, int groups) { return bits <= 6 && (groups << bits) <= BOOK_ENTRIES; }

template <Shift SHIFT, int BITS, int GROUPS>
class BookDecoder {
    static_assert(books_fit(BITS, GROUPS));
    using Codes = BookCodes<BITS, NoBook<BITS>>;
    static constexpr int CODES = 1 << BITS;
    static constexpr int BOOKS = CODES * GROUPS > WORDS ? 2 : 1;

  public:
    explicit BookDecoder(const Plan& plan) : codes_(plan) {
        const Ints lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int i = 0; i < 2 * BOOKS; ++i) {
            values_[i] = load(plan.values + i * LANES % CODES);  // codes beyond the last repeat
            const Ints entry = _mm512_add_epi32(lane, _mm512_set1_epi32(i * LANES));
            index_[i] = _mm512_and_si512(_mm512_srli_epi32(entry, BITS), _mm512_set1_epi32(GROUPS - 1));
        }
        uint16_t groups[WORDS];
        for (int word = 0; word < WORDS; ++word) groups[word] = uint16_t(word * GROUPS / WORDS << BITS);
        groups_ = load_words(groups);
    }

    // As LawDecoder's, in the codes' order.
    static constexpr int STAGES = TURNS, WIDTH = 1;
    struct State {
        typename Codes::Raw codes;
        Words books[BOOKS];
    };

    template <class Stored>
    QUANTLIB_INLINE State begin(const Stored& stored, const Planes& planes, const RowNumbers& numbers, int64_t span,
                                int64_t index, int64_t ahead) const {
        State state;
        state.codes = codes_.raw(stored, planes, index, ahead);
        for (int i = 0; i < BOOKS; ++i) {
            const Floats low = entries(numbers, span, 2 * i);
            state.books[i] = round_words(low, CODES * GROUPS == LANES ? low : entries(numbers, span, 2 * i + 1));
        }
        return state;
    }
    template <int STAGE, class Stored>
    QUANTLIB_INLINE void stage(const Stored& stored, const State& state, Words* out) const {
        codes_.template stage<STAGE>(state.codes, out);
        if constexpr (GROUPS > 1) *out = choose(same_words(CODES - 1), *out, groups_);
        if constexpr (BOOKS == 1) *out = _mm512_permutexvar_epi16(*out, state.books[0]);
        if constexpr (BOOKS == 2) *out = _mm512_permutex2var_epi16(state.books[0], *out, state.books[1]);
        *out = stored.keep_words(*out);
    }

  private:
    const Codes codes_;
    Floats values_[2 * BOOKS];
    Ints index_[2 * BOOKS];  // of the block of each entry
    Words groups_;           // of the block of each word, above a code

    QUANTLIB_INLINE Floats number(const float* numbers, int64_t span, int i) const {
        if constexpr (CODES >= LANES) return broadcast(numbers[span * GROUPS + (i * LANES / CODES) % GROUPS]);
        return permute(index_[i], load(numbers + span * GROUPS));
    }

    // LANES entries of the books: from entry i * LANES on.
    QUANTLIB_INLINE Floats entries(const RowNumbers& numbers, int64_t span, int i) const {
        Floats shift = zero();
        if constexpr (SHIFT == Shift::zero) shift = number(numbers.zero, span, i);
        if constexpr (SHIFT == Shift::minimum) shift = number(numbers.minimum, span, i);
        return scaled<SHIFT>(values_[i], number(numbers.scale, span, i), shift);
    }
};

inline int groups_of(const Plan& plan) { return SPAN / plan.span_piece; }
// Whether decoded words are parted.
inline bool parted(const Plan& plan) { return !books_fit(plan.bits, groups_of(plan)); }

template <Shift SHIFT, int BITS, class With>
inline void with_groups(const Plan& plan, With with) {
    if constexpr (books_fit(BITS, 8)) {
        if (groups_of(plan) == 8) return with(BookDecoder<SHIFT, BITS, 8>(plan));
    }
    if constexpr (books_fit(BITS, 4)) {
        if (groups_of(plan) == 4) return with(BookDecoder<SHIFT, BITS, 4>(plan));
    }
    if constexpr (books_fit(BITS, 2)) {
        if (groups_of(plan) == 2) return with(BookDecoder<SHIFT, BITS, 2>(plan));
    }
    if (groups_of(plan) == 1) return with(BookDecoder<SHIFT, BITS, 1>(plan));
    with(LawDecoder<SHIFT, BookCodes<BITS>>(plan));
}

template <Shift SHIFT, class With>
inline void with_bits(const Plan& plan, With with) {
    switch (plan.bits) {
        case 2: return with_groups<SHIFT, 2>(plan, with);
        case 3: return with_groups<SHIFT, 3>(plan, with);
        case 4: return with_groups<SHIFT, 4>(plan, with);
        case 5: return with_groups<SHIFT, 5>(plan, with);
        case 6: return with_groups<SHIFT, 6>(plan, with);
        default: return with(LawDecoder<SHIFT, ByteCodes>(plan));
    }
}

// Call `with` what decodes and rounds this plan's weights.
template <class With>
inline void with_rounding_decoder(const Plan& plan, With with) {
    switch (shift_of(plan)) {
        case Shift::none: return with_bits<Shift::none>(plan, with);
        case Shift::zero: return with_bits<Shift::zero>(plan, with);
        case Shift::minimum: return with_bits<Shift::minimum>(plan, with);
    }
}

// Stages STAGE and following of a span.
template <int STAGE = 0, class Decoder, class Stored>
QUANTLIB_INLINE void decode_stages(const Decoder& decoder, const Stored& stored, const typename Decoder::State& state, Words* out) {
    decoder.template stage<STAGE>(stored, state, out + STAGE * Decoder::WIDTH);
    if constexpr (STAGE + 1 < Decoder::STAGES) decode_stages<STAGE + 1>(decoder, stored, state, out);
}

// Spans start ... stop of one row; `planes` count spans from `start`.
template <class Decoder, class Stored>
QUANTLIB_INLINE void decode_spans(const Decoder& decoder, const Stored& stored, const Planes& planes, const RowNumbers& numbers,
                                  int64_t start, int64_t stop, uint16_t* to, int64_t ahead) {
    for (int64_t span = start; span < stop; ++span, to += SPAN) {
        Words w[TURNS];
        decode_stages(decoder, stored, decoder.begin(stored, planes, numbers, span, span - start, ahead), w);
        for (int turn = 0; turn < TURNS; ++turn) store_words(to + turn * WORDS, w[turn]);
    }
}

// Blocks of W are decoded row by row, some 50 ns each: the next rows' parts of a block are asked for in time.
constexpr int ROWS_AHEAD = 8;

// The same of a row of W, beyond whose stored codes spans may reach; `numbers` are the row's.
template <class Decoder>
inline void decode_columns(const Decoder& kept, const Plan& plan, const Parts& parts, int64_t row, int64_t start, int64_t stop,
                           uint16_t* to, const RowNumbers& numbers) {
    const Decoder decoder = kept;  // a local copy stays in registers
    const PairsRow packed(plan, parts, row);
    const int64_t ahead = ROWS_AHEAD * (plan.padded_k * plan.bits / 8);
    const int64_t inside = most(start, least(stop, packed.whole()));
    decode_spans(decoder, WholeSpan(), packed.planes(start), numbers, start, inside, to, ahead);
    if (inside < stop) {
        decode_spans(decoder, packed.part(), packed.tail(), numbers, inside, stop, to + (inside - start) * SPAN, ahead);
    }
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

// y[M, N] = x[M, K] W^T + bias in bf16 for few rows of x: weights, rounded as in pairs_round.h, go from their codes through registers
// into products of ROWS rows of W with XS rows of x, whose sums stay in registers from the first column to the last.
//
// A decoder says how many: 4 x 4 where codes are cheap to decode once more for the next rows of x, for four of those fit the
// first-level cache; 3 x 8 and 2 x 8 where they are not. Weights are decoded one stage before they are multiplied: a processor
// takes the oldest instruction that is ready, so that what decodes the next ones would wait for all products before it.
//
// A row of y depends neither on the number of threads nor on the other rows of x.
#pragma once

#include "pairs_round.h"
#include "pairs_x.h"
#include "rows.h"

#include <type_traits>

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int MOST_SKINNY_ROWS = 4, MOST_SKINNY_XS = 8;

// x in the order of decoded words, parted or not; rows of zeros behind the last.
struct SkinnyX {
    const uint16_t* words;
    int64_t stride, spans;
};

// Spans start ... stop of ROWS rows of W with XS of x; `planes` count spans from `start`.
template <class Decoder, class Stored>
struct SkinnySpans {
    static constexpr int WIDTH = Decoder::WIDTH, ROWS = Decoder::ROWS, XS = Decoder::XS;
    using Weights = Words[ROWS][WIDTH];
    using Totals = Floats[ROWS][XS];

    const Decoder& decoder;
    const Stored& stored;
    const Planes (&planes)[ROWS];
    const RowNumbers (&numbers)[ROWS];
    const SkinnyX& x;
    const int64_t start, stop;
    typename Decoder::State state[ROWS];

    QUANTLIB_INLINE void begin(int64_t span) {
        for (int r = 0; r < ROWS; ++r) {
            state[r] = decoder.begin(stored, planes[r], numbers[r], span, span - start);
        }
    }
    template <int STAGE>
    QUANTLIB_INLINE void decode(Weights& weights) const {
        for (int r = 0; r < ROWS; ++r) decoder.template stage<STAGE>(stored, state[r], weights[r]);
    }
    QUANTLIB_INLINE void multiply(const Weights& weights, const uint16_t* words, Totals& total) const {
        for (int v = 0; v < WIDTH; ++v) {
#pragma GCC unroll 8  // else sums go through memory
            for (int m = 0; m < XS; ++m) {
                const Words a = load_words(words + m * x.stride + v * WORDS);
                for (int r = 0; r < ROWS; ++r) total[r][m] = dot(total[r][m], weights[r][v], a);
            }
        }
    }
    // Multiply stage STAGE of a span and those after it; `now` holds its weights. The first weights of span `after` end up in `now`.
    template <int STAGE>
    QUANTLIB_INLINE void stages(const uint16_t* words, int64_t after, Weights& now, Weights& next, Totals& total) {
        decode<(STAGE + 1) % Decoder::STAGES>(next);
        if constexpr (STAGE + 2 == Decoder::STAGES) begin(after);
        multiply(now, words, total);
        if constexpr (STAGE + 1 < Decoder::STAGES) stages<STAGE + 1>(words + WIDTH * WORDS, after, next, now, total);
    }
    QUANTLIB_INLINE void add(Totals& total) {
        static_assert(Decoder::STAGES % 2 == 0);  // else the weights of the next span end up in `next`
        Weights now, next;
        begin(start);
        decode<0>(now);
        for (int64_t span = start; span < stop; ++span) {
            stages<0>(x.words + span * SPAN, least(span + 1, stop - 1), now, next, total);
        }
    }
};

// values[m][r][0] = the product of row r of W with row m of x, for `count` rows that x has.
template <class Decoder, int ROWS>
void rounded_rows(const Decoder& kept, const Plan& plan, const Parts& parts, const int64_t (&which)[ROWS],
                  const RowNumbers (&numbers)[ROWS], const SkinnyX& x, int64_t count, float* values) {
    const Decoder decoder = kept;  // a local copy stays in registers
    Floats total[ROWS][Decoder::XS];
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int m = 0; m < Decoder::XS; ++m) total[r][m] = zero();
    }
    Planes planes[ROWS];
    for (int r = 0; r < ROWS; ++r) planes[r] = PairsRow(plan, parts, which[r]).planes();
    const PairsRow first(plan, parts, which[0]);
    const int64_t inside = least(first.whole(), x.spans);
    if (inside > 0) SkinnySpans<Decoder, WholeSpan>{decoder, WholeSpan(), planes, numbers, x, 0, inside, {}}.add(total);
    if (inside < x.spans) {
        const PartSpan part = first.part();
        for (int r = 0; r < ROWS; ++r) planes[r] = PairsRow(plan, parts, which[r]).tail();
        SkinnySpans<Decoder, PartSpan>{decoder, part, planes, numbers, x, inside, x.spans, {}}.add(total);
    }
#pragma GCC unroll 8
    for (int m = 0; m < Decoder::XS; ++m) {
        if (m >= count) break;
        for (int r = 0; r < ROWS; ++r) values[(m * ROWS + r) * WRITE_ROWS] = sum(total[r][m]);
    }
}

struct PairsSkinny {
    const LinearCall& call;
    const SkinnyX x;
    const Run run;

    // Floats that rows() works in.
    static int64_t memory(const LinearCall& call, const Run& run) { return DotMemory<MOST_SKINNY_ROWS>::size(call, run); }

    void rows(int64_t start, int64_t stop, float* floats) const {
        const Plan& plan = *call.plan;
        const auto expand = [&](int64_t row, int64_t rows, const RowNumbers& numbers) {
            expand_run(plan, call.parts, row, rows, run, numbers);
        };
        with_rounding_decoder(plan, [&](const auto& decoder) {
            using Decoder = std::decay_t<decltype(decoder)>;
            constexpr int ROWS = Decoder::ROWS;
            static_assert(ROWS <= MOST_SKINNY_ROWS && Decoder::XS <= MOST_SKINNY_XS);
            multiply_streams<ROWS>(
                call, start, stop, DotMemory<ROWS>(call, run, floats), expand,
                [&](const int64_t(&which)[ROWS], const RowNumbers(&numbers)[ROWS], float* values) {
                    for (int64_t m = 0; m < call.m; m += Decoder::XS) {
                        const SkinnyX from = {x.words + m * x.stride, x.stride, x.spans};
                        rounded_rows(decoder, plan, call.parts, which, numbers, from, call.m - m, values + m * ROWS * WRITE_ROWS);
                    }
                });
        });
    }
};

inline bool pairs_skinny(const LinearCall& call) {
    const Plan& plan = *call.plan;
    if (call.m == 0 || plan.n == 0) return true;
    const int64_t spans = spans_of(plan.k), x_rows = round_up(call.m, MOST_SKINNY_XS);
    // Rows a multiple of 4096 bytes apart would all compete for the same few sets of the first-level cache.
    const int64_t x_stride = spans * SPAN + WORDS;
    const int threads = useful_threads(plan.n * spans * SPAN * call.m, call.threads);
    const Run run(plan, least(plan.padded_k, spans * SPAN));
    const int64_t thread_floats = round_up(PairsSkinny::memory(call, run), LANES);
    const Scratch words(x_rows * x_stride / 2), scratch(threads * thread_floats);
    if (words.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* x = reinterpret_cast<uint16_t*>(words.floats);
    for (int64_t m = 0; m < call.m; ++m) arrange_row(call, m, spans, parted(plan), x + m * x_stride);
    memset(x + call.m * x_stride, 0, (x_rows - call.m) * x_stride * sizeof(uint16_t));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        const PairsSkinny work{call, {x, x_stride, spans}, run};
        work.rows(plan.n * part / threads, plan.n * (part + 1) / threads, scratch.floats + part * thread_floats);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

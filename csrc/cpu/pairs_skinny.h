// y[M, N] = x[M, K] W^T + bias in bf16 for few rows of x: weights of two rows, rounded as in pairs_round.h, go from their codes
// through registers into products with eight rows of x, whose sums stay in registers from the first column to the last.
//
// A row of y depends neither on the number of threads nor on the other rows of x.
#pragma once

#include "pairs_round.h"
#include "pairs_x.h"
#include "rows.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

// x in the order of decoded words, parted or not; rows of zeros behind the last.
struct SkinnyX {
    const uint16_t* words;
    int64_t stride, spans;
};

// total[r][m] += the product of spans start ... stop of row r of W and row m of x.
template <int M, class Decoder, class Stored>
QUANTLIB_INLINE void add_rounded_spans(const Decoder& decoder, const Stored& stored, const Planes (&planes)[DOT_ROWS],
                                       const RowNumbers (&numbers)[DOT_ROWS], const SkinnyX& x, int64_t start, int64_t stop,
                                       Floats (&total)[DOT_ROWS][M]) {
    for (int64_t span = start; span < stop; ++span) {
        Words w[DOT_ROWS][TURNS];
        for (int r = 0; r < DOT_ROWS; ++r) decoder.span(stored, planes[r], numbers[r], span, span - start, w[r]);
        for (int turn = 0; turn < TURNS; ++turn) {
#pragma GCC unroll 8  // else sums go through memory
            for (int m = 0; m < M; ++m) {
                const Words a = load_words(x.words + m * x.stride + span * SPAN + turn * WORDS);
                for (int r = 0; r < DOT_ROWS; ++r) total[r][m] = dot(total[r][m], w[r][turn], a);
            }
        }
    }
}

// values[m][r][0] = the product of row r of W with row m of x, for `count` rows of the M that x has.
template <int M, class Decoder>
void rounded_rows(const Decoder& kept, const PairsRow (&rows)[DOT_ROWS], const RowNumbers (&numbers)[DOT_ROWS], const SkinnyX& x,
                  int64_t count, float* values) {
    const Decoder decoder = kept;  // a local copy stays in registers
    Floats total[DOT_ROWS][M];
    for (int r = 0; r < DOT_ROWS; ++r) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) total[r][m] = zero();
    }
    const int64_t inside = least(rows[0].whole(), x.spans);
    const Planes planes[DOT_ROWS] = {rows[0].planes(), rows[1].planes()};
    add_rounded_spans(decoder, WholeSpan(), planes, numbers, x, 0, inside, total);
    if (inside < x.spans) {
        const Planes tails[DOT_ROWS] = {rows[0].tail(), rows[1].tail()};
        add_rounded_spans(decoder, rows[0].part(), tails, numbers, x, inside, x.spans, total);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        if (m >= count) break;
        for (int r = 0; r < DOT_ROWS; ++r) values[(m * DOT_ROWS + r) * WRITE_ROWS] = sum(total[r][m]);
    }
}

struct PairsSkinny {
    static constexpr int MANY = 8, FEW = 4;  // rows of x at once

    const LinearCall& call;
    const SkinnyX x;

    template <class Decoder>
    inline void two_rows(const Decoder& decoder, int64_t first, int64_t second, const RowNumbers (&numbers)[DOT_ROWS],
                         float* values) const {
        const Plan& plan = *call.plan;
        const PairsRow rows[DOT_ROWS] = {{plan, call.parts, first}, {plan, call.parts, second}};
        for (int64_t m = 0; m < call.m;) {
            const SkinnyX part = {x.words + m * x.stride, x.stride, x.spans};
            float* to = values + m * DOT_ROWS * WRITE_ROWS;
            if (call.m - m > FEW) {
                rounded_rows<MANY>(decoder, rows, numbers, part, call.m - m, to);
                m += MANY;
            } else {
                rounded_rows<FEW>(decoder, rows, numbers, part, call.m - m, to);
                m += FEW;
            }
        }
    }

    void rows(int64_t start, int64_t stop, const DotMemory& memory) const {
        const Plan& plan = *call.plan;
        const auto expand = [&](int64_t row, int64_t rows, const RowNumbers& numbers) {
            expand_run(plan, call.parts, row, rows, memory.run, numbers);
        };
        with_rounding_decoder(plan, [&](const auto& decoder) {
            multiply_row_pairs(call, start, stop, memory, expand,
                               [&](int64_t first, int64_t second, const RowNumbers(&numbers)[DOT_ROWS], float* values) {
                                   this->two_rows(decoder, first, second, numbers, values);
                               });
        });
    }
};

inline bool pairs_skinny(const LinearCall& call) {
    const Plan& plan = *call.plan;
    if (call.m == 0 || plan.n == 0) return true;
    const int64_t spans = spans_of(plan.k), x_rows = round_up(call.m, PairsSkinny::MANY);
    // Rows a multiple of 4096 bytes apart would all compete for the same few sets of the first-level cache.
    const int64_t x_stride = spans * SPAN + WORDS;
    const int threads = useful_threads(plan.n * spans * SPAN * call.m, call.threads);
    const Run run(plan, least(plan.padded_k, spans * SPAN));
    const int64_t thread_floats = round_up(DotMemory::size(call, run), LANES);
    const Scratch words(x_rows * x_stride / 2), scratch(threads * thread_floats);
    if (words.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* x = reinterpret_cast<uint16_t*>(words.floats);
    for (int64_t m = 0; m < call.m; ++m) arrange_row(call, m, spans, parted(plan), x + m * x_stride);
    memset(x + call.m * x_stride, 0, (x_rows - call.m) * x_stride * sizeof(uint16_t));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        const DotMemory memory(call, run, scratch.floats + part * thread_floats);
        const PairsSkinny work{call, {x, x_stride, spans}};
        work.rows(plan.n * part / threads, plan.n * (part + 1) / threads, memory);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

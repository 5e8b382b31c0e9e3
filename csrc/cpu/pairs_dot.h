// y[M, N] = x[M, K] W^T + bias for few rows of x, at the speed of memory: codes go from their packed bytes through a code book of
// bf16 numbers straight into dot products; scales and zeros are applied to the fp32 sums of eight columns, minima to those of as many
// columns as share one.
//
// A row of y depends neither on the number of threads nor on the other rows of x: each product of a row of W and a row of x is
// added up in one order.
#pragma once

#include "pairs_x.h"
#include "rows.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

// x as pairs_x.h arranges it.
struct PairsX {
    const uint16_t* words;
    int64_t row_stride, plane_stride;  // in words
    const float* sums;                 // of eight columns each, or of a minimum's; null where no format needs them
    int64_t sums_stride, minima;       // minima of a row, 0 where a format has none
    inline PairsX from_row(int64_t m) const {
        return {words + m * row_stride, row_stride, plane_stride, sums + m * sums_stride, sums_stride, minima};
    }
};

// total[r][m] += what spans start ... stop contribute to the product of rows r and m, but for minima; `planes` count spans from
// `start`.
template <Shift SHIFT, int M, int PLANES, class Codes, class Stored>
QUANTLIB_INLINE void add_spans(const Codes& codes, const Spread& spread, const Stored& stored, const Planes (&planes)[DOT_ROWS],
                               const RowNumbers (&numbers)[DOT_ROWS], const PairsX& x, int64_t start, int64_t stop,
                               Floats (&total)[DOT_ROWS][M]) {
    for (int64_t span = start; span < stop; ++span) {
        Words w[DOT_ROWS][TURNS];
        Floats scale[DOT_ROWS], shift[DOT_ROWS];
        for (int r = 0; r < DOT_ROWS; ++r) {
            look_up_span(codes, stored, planes[r], span - start, w[r]);
            scale[r] = spread(stored, numbers[r].scale, span);
            if constexpr (SHIFT == Shift::zero) shift[r] = spread(stored, numbers[r].zero, span);
        }
        for (int m = 0; m < M; ++m) {
            const uint16_t* words = x.words + m * x.row_stride + span * SPAN;
            Floats sum[DOT_ROWS];
            for (int r = 0; r < DOT_ROWS; ++r) sum[r] = zero();
            for (int plane = 0; plane < PLANES; ++plane) {
                for (int turn = 0; turn < TURNS; ++turn) {
                    const Words a = load_words(words + plane * x.plane_stride + turn * WORDS);
                    for (int r = 0; r < DOT_ROWS; ++r) sum[r] = dot(sum[r], w[r][turn], a);
                }
            }
            Floats sums = zero();
            if constexpr (SHIFT == Shift::zero) sums = load(x.sums + m * x.sums_stride + span * LANES);
            for (int r = 0; r < DOT_ROWS; ++r) {
                if constexpr (SHIFT == Shift::zero) sum[r] = negative_multiply_add(shift[r], sums, sum[r]);
                total[r][m] = multiply_add(sum[r], scale[r], total[r][m]);
            }
        }
    }
}

// total[r][m] -= the minima of row r times sums of row m of x. Lanes are minima here: in the end all lanes are added up.
template <int M>
QUANTLIB_INLINE void subtract_minima(const RowNumbers (&numbers)[DOT_ROWS], const PairsX& x, Floats (&total)[DOT_ROWS][M]) {
    for (int64_t at = 0; at < x.minima; at += LANES) {
        for (int m = 0; m < M; ++m) {
            const Floats sums = load(x.sums + m * x.sums_stride + at);
            for (int r = 0; r < DOT_ROWS; ++r) {
                // Behind a row's last minimum stands what belongs to another.
                const Floats minima = load_first(numbers[r].minimum + at, x.minima - at);
                total[r][m] = negative_multiply_add(minima, sums, total[r][m]);
            }
        }
    }
}

// values[m][r][0] = the product of row r of W with row m of x.
template <Shift SHIFT, int M, int PLANES, class Codes>
void dot_rows(const Plan& plan, const Codes& kept, const PairsRow (&rows)[DOT_ROWS], const RowNumbers (&numbers)[DOT_ROWS],
              const PairsX& x, int64_t spans, float* values) {
    const Codes codes = kept;  // a local copy stays in registers
    const Spread spread(plan);
    Floats total[DOT_ROWS][M];
    for (int r = 0; r < DOT_ROWS; ++r) {
        for (int m = 0; m < M; ++m) total[r][m] = zero();
    }
    const int64_t inside = least(rows[0].whole(), spans);
    const Planes planes[DOT_ROWS] = {rows[0].planes(), rows[1].planes()};
    add_spans<SHIFT, M, PLANES>(codes, spread, WholeSpan(), planes, numbers, x, 0, inside, total);
    if (inside < spans) {
        const Planes tails[DOT_ROWS] = {rows[0].tail(), rows[1].tail()};
        add_spans<SHIFT, M, PLANES>(codes, spread, rows[0].part(), tails, numbers, x, inside, spans, total);
    }
    if constexpr (SHIFT == Shift::minimum) subtract_minima<M>(numbers, x, total);
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < DOT_ROWS; ++r) values[(m * DOT_ROWS + r) * WRITE_ROWS] = sum(total[r][m]);
    }
}

struct PairsDot {
    const LinearCall& call;
    const PairsX x;
    const int64_t spans;

    // Two rows of W with rows m ... of x, M at a time as long as there are M.
    template <Shift SHIFT, int M, int PLANES, class Codes>
    inline void some_xs(const Codes& codes, const PairsRow (&rows)[DOT_ROWS], const RowNumbers (&numbers)[DOT_ROWS], int64_t& m,
                        float* values) const {
        for (; m + M <= call.m; m += M) {
            dot_rows<SHIFT, M, PLANES>(*call.plan, codes, rows, numbers, x.from_row(m), spans,
                                       values + m * DOT_ROWS * WRITE_ROWS);
        }
    }

    // Two rows of W with every row of x, as many at a time as registers hold.
    template <Shift SHIFT, int PLANES, class Codes>
    inline void two_rows(const Codes& codes, const int64_t (&which)[DOT_ROWS], const RowNumbers (&numbers)[DOT_ROWS],
                         float* values) const {
        const Plan& plan = *call.plan;
        const PairsRow rows[DOT_ROWS] = {{plan, call.parts, which[0]}, {plan, call.parts, which[1]}};
        int64_t m = 0;
        if constexpr (PLANES == 1) {
            some_xs<SHIFT, 4, PLANES>(codes, rows, numbers, m, values);
        }
        some_xs<SHIFT, 2, PLANES>(codes, rows, numbers, m, values);
        some_xs<SHIFT, 1, PLANES>(codes, rows, numbers, m, values);
    }

    template <int PLANES>
    void rows_of_planes(int64_t start, int64_t stop, const DotMemory<DOT_ROWS>& memory) const {
        with_decoder(*call.plan, [&](const auto& codes, auto shifted) {
            const auto expand = [&](int64_t row, int64_t rows, const RowNumbers& numbers) {
                expand_run(*call.plan, call.parts, row, rows, memory.run, numbers);
            };
            multiply_streams<DOT_ROWS>(
                call, start, stop, memory, expand,
                [&](const int64_t(&which)[DOT_ROWS], const RowNumbers(&numbers)[DOT_ROWS], float* values) {
                    this->template two_rows<decltype(shifted)::shift, PLANES>(codes, which, numbers, values);
                });
        });
    }

    void rows(int64_t start, int64_t stop, const DotMemory<DOT_ROWS>& memory) const {
        switch (planes_in(call.dtype)) {
            case 1: return rows_of_planes<1>(start, stop, memory);
            case 2: return rows_of_planes<2>(start, stop, memory);
            default: return rows_of_planes<3>(start, stop, memory);
        }
    }
};

inline bool pairs_dot(const Joined<LinearCall>& joined) {
    const LinearCall& first = joined.calls[0];
    const Plan& plan = *first.plan;
    const int64_t spans = spans_of(plan.k), planes = planes_in(first.dtype), rows = rows_of(joined);
    if (first.m == 0 || rows == 0) return true;
    // Rows a multiple of 4096 bytes apart would all compete for the same few sets of the first-level cache.
    const int64_t row_words = planes * spans * SPAN + WORDS;
    const int threads = useful_threads(rows * spans * SPAN * first.m, first.threads);
    const Run run(plan, least(plan.padded_k, spans * SPAN));
    const bool shifted = shift_of(plan) != Shift::none;
    const int64_t sums_stride = shifted ? spans * LANES : 0;
    const int64_t minima = plan.has_minimum ? (plan.k + plan.span_piece - 1) / plan.span_piece : 0;
    const int64_t thread_floats = DotMemory<DOT_ROWS>::size(first, run);
    const Scratch words(first.m * row_words / 2), sums(first.m * sums_stride), scratch(threads * thread_floats);
    if (words.floats == nullptr || sums.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* arranged = reinterpret_cast<uint16_t*>(words.floats);
    for (int64_t m = 0; m < first.m; ++m) {
        arrange_row(first, m, spans, false, arranged + m * row_words);
        float* const to = sums.floats + m * sums_stride;
        if (shifted) sum_lanes(arranged + m * row_words, planes, spans, to);
        if (minima > 0) sum_pieces(to, plan.span_piece / 8, spans * LANES, to);
    }
    const PairsX x = {arranged, row_words, spans * SPAN, sums.floats, sums_stride, minima};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        const DotMemory<DOT_ROWS> memory(first, run, scratch.floats + part * thread_floats);
        for_rows(joined, part, threads, [&](const LinearCall& call, int64_t start, int64_t stop) {
            const PairsDot work{call, x, spans};
            work.rows(start, stop, memory);
        });
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

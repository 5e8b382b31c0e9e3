// y[M, N] = x[M, K] W^T + bias for few rows of x: codes go from their packed bytes into fp32 products without a store, once for
// each row of x; scales, zeros and minima are applied to the fp32 sums of a lane, four or eight columns of one block.
//
// Each product of a row of W and a row of x is added up in one order, whatever the other rows and the number of threads.
#pragma once

#include "lookup_place.h"
#include "lookup_x.h"

#ifdef QUANTLIB_HAS_LOOKUP
namespace quantlib::cpu::QUANTLIB_ISA {

// x as lookup_x.h arranges it.
struct LookupX {
    const float* numbers;
    int64_t stride;
    const float* sums;    // [spans][2][LANES]: of each lane of each half; where halves are added, the first is of both
    const float* biases;  // [spans][LANES]: of both, times what the codec subtracts, negative
    int64_t spans;
    inline LookupX from_row(int64_t m) const {
        return {numbers + m * stride, stride, sums + m * spans * 2 * LANES, biases + m * spans * LANES, spans};
    }
};

// The sums of one row of W and one of x; where both halves of a span have the same numbers, they are added first.
template <bool SAME>
struct Total {
    Floats half[SAME ? 1 : 2];
    QUANTLIB_INLINE void clear() {
        for (Floats& each : half) each = zero();
    }
    inline float value() const {
        if constexpr (SAME) return sum(half[0]);
        return sum(add(half[0], half[sizeof(half) / sizeof(Floats) - 1]));
    }

    // What the products of a span's halves add. `sums` of x: of both halves together where they are added.
    template <Shift SHIFT>
    QUANTLIB_INLINE void add_span(Floats (&products)[2], const float* sums, const Floats (&scale)[2], const Floats (&shift)[2]) {
        if constexpr (SAME) products[0] = add(products[0], products[1]);
        for (int h = 0; h < (SAME ? 1 : 2); ++h) {
            if constexpr (SHIFT == Shift::zero) {
                products[h] = negative_multiply_add(shift[h], load(sums + h * LANES), products[h]);
            }
            half[h] = multiply_add(products[h], scale[h], half[h]);
            if constexpr (SHIFT == Shift::minimum) half[h] = negative_multiply_add(shift[h], load(sums + h * LANES), half[h]);
        }
    }
};

// Rows of W under way, and what their codes showed.
template <bool SAME>
struct DotState {
    Total<SAME> total[DOT_ROWS];
    Ints seen[DOT_ROWS];
};

// Add what the products of one span are worth to a row's total.
template <Shift SHIFT, class SpanLanes>
QUANTLIB_INLINE void settle(const SpanLanes& lanes, const RowNumbers& numbers, const LookupX& x, int64_t span,
                            Floats (&products)[2], Total<SpanLanes::SAME>& total) {
    Floats scale[2], shift[2] = {zero(), zero()};
    lanes(numbers.scale, span, scale);
    if constexpr (SHIFT == Shift::zero) lanes(numbers.zero, span, shift);
    if constexpr (SHIFT == Shift::minimum) lanes(numbers.minimum, span, shift);
    total.template add_span<SHIFT>(products, x.sums + span * 2 * LANES, scale, shift);
}

// What one span contributes, row of W by row.
template <Shift SHIFT, class Codes, class SpanLanes>
QUANTLIB_INLINE void add_rows(const Codes& codes, const SpanLanes& lanes, const Planes (&planes)[DOT_ROWS], int64_t at,
                              const RowNumbers (&numbers)[DOT_ROWS], const LookupX& x, int64_t span,
                              DotState<SpanLanes::SAME>& state) {
    const float* from = x.numbers + span * SPAN;
    for (int r = 0; r < DOT_ROWS; ++r) {
        hide(from);  // another load of x is cheaper than keeping it: there are 16 registers
        Floats products[2];
        codes.numbers(planes[r], at, FETCH_AHEAD, state.seen[r], [&](int v, Floats w) QUANTLIB_LAMBDA {
            const Floats a = load(from + v * LANES);
            products[v / HALF] = v % HALF == 0 ? multiply(w, a) : multiply_add(w, a, products[v / HALF]);
        });
        settle<SHIFT>(lanes, numbers[r], x, span, products, state.total[r]);
    }
}

// The same where numbers are made vector by vector: both rows of W in step, vectors of both halves by turns.
template <Shift SHIFT, class Codes, class SpanLanes>
QUANTLIB_INLINE void add_places(const Codes& codes, const SpanLanes& lanes, const Planes (&planes)[DOT_ROWS], int64_t at,
                                const RowNumbers (&numbers)[DOT_ROWS], const LookupX& x, int64_t span,
                                DotState<SpanLanes::SAME>& state) {
    const Packed packed[DOT_ROWS] = {codes.packed(planes[0], at, FETCH_AHEAD), codes.packed(planes[1], at, FETCH_AHEAD)};
    const float* from = x.numbers + span * SPAN;
    const Floats bias = load(x.biases + span * LANES);
    Floats products[DOT_ROWS][2] = {{bias, zero()}, {bias, zero()}};
    for (int i = 0; i < SPAN_VECTORS; ++i) {
        const int h = i % 2, v = h * HALF + i / 2;
        const Floats a = load(from + v * LANES);
        for (int r = 0; r < DOT_ROWS; ++r) {
            const Floats w = codes.vector(packed[r], v);
            products[r][h] = i == 1 ? multiply(w, a) : multiply_add(w, a, products[r][h]);
        }
    }
    for (int r = 0; r < DOT_ROWS; ++r) settle<SHIFT>(lanes, numbers[r], x, span, products[r], state.total[r]);
}

// What spans start ... stop contribute; `planes` count spans from `start`.
template <Shift SHIFT, class Codes, class SpanLanes>
QUANTLIB_INLINE void add_spans(const Codes& codes, const SpanLanes& lanes, const Planes (&planes)[DOT_ROWS],
                               const RowNumbers (&numbers)[DOT_ROWS], const LookupX& x, int64_t start, int64_t stop,
                               DotState<SpanLanes::SAME>& state) {
    for (int64_t span = start; span < stop; ++span) {
        if constexpr (Codes::IN_PLACE) {
            add_places<SHIFT>(codes, lanes, planes, span - start, numbers, x, span, state);
        } else {
            add_rows<SHIFT>(codes, lanes, planes, span - start, numbers, x, span, state);
        }
    }
}

// values[r][0] = the product of row r of W with x.
template <Shift SHIFT, class Codes, class SpanLanes>
void dot_rows(const Codes& kept, const SpanLanes& kept_lanes, const LookupRow (&rows)[DOT_ROWS],
              const RowNumbers (&numbers)[DOT_ROWS], const LookupX& x, int64_t spans, float* values) {
    const Codes codes = kept;  // local copies stay in registers
    const SpanLanes lanes = kept_lanes;
    DotState<SpanLanes::SAME> state;
    for (int r = 0; r < DOT_ROWS; ++r) {
        state.total[r].clear();
        state.seen[r] = codes.start();
    }
    const int64_t inside = least(rows[0].whole(), spans);
    const Planes planes[DOT_ROWS] = {rows[0].planes(), rows[1].planes()};
    add_spans<SHIFT>(codes, lanes, planes, numbers, x, 0, inside, state);
    if (inside < spans) {
        const Planes tails[DOT_ROWS] = {rows[0].tail(), rows[1].tail()};
        add_spans<SHIFT>(codes, lanes, tails, numbers, x, inside, spans, state);
    }
    for (int r = 0; r < DOT_ROWS; ++r) {
        const float damage = Codes::damaged(state.seen[r]) ? __builtin_nanf("") : 0.0f;
        values[r * WRITE_ROWS] = state.total[r].value() + damage;
    }
}

struct LookupDot {
    const LinearCall& call;
    const LookupX x;
    const int64_t spans;

    template <Shift SHIFT, class Codes, class SpanLanes>
    inline void two_rows(const Codes& codes, const SpanLanes& lanes, const int64_t (&which)[DOT_ROWS],
                         const RowNumbers (&numbers)[DOT_ROWS], float* values) const {
        const Plan& plan = *call.plan;
        const LookupRow rows[DOT_ROWS] = {{plan, call.parts, which[0]}, {plan, call.parts, which[1]}};
        for (int64_t m = 0; m < call.m; ++m) {
            dot_rows<SHIFT>(codes, lanes, rows, numbers, x.from_row(m), spans, values + m * DOT_ROWS * WRITE_ROWS);
        }
    }

    template <Shift SHIFT, class Codes, class SpanLanes>
    void rows(const Codes& codes, const SpanLanes& lanes, int64_t start, int64_t stop,
              const DotMemory<DOT_ROWS>& memory) const {
        const auto expand = [&](int64_t row, int64_t rows, const RowNumbers& numbers) {
            expand_lookup(*call.plan, call.parts, row, rows, memory.run, codes.unit, numbers);
        };
        multiply_streams<DOT_ROWS>(
            call, start, stop, memory, expand,
            [&](const int64_t(&which)[DOT_ROWS], const RowNumbers(&numbers)[DOT_ROWS], float* values) {
                two_rows<SHIFT>(codes, lanes, which, numbers, values);
            });
    }
};

// x in the order of `codes`, with the sums that a format needs.
template <class Codes, class SpanLanes>
inline LookupX arrange_x(const LinearCall& call, const Codes& codes, const SpanLanes&, int64_t spans, float* numbers,
                         float* sums) {
    const int64_t stride = x_stride_of(spans), all = call.m * spans;
    const Order order(codes);
    float* const biases = sums + all * 2 * LANES;
    for (int64_t m = 0; m < call.m; ++m) {
        arrange_row(call, order, m, spans, numbers + m * stride);
        sum_halves(numbers + m * stride, order, spans, sums + m * spans * 2 * LANES);
    }
    for (int64_t span = 0; SpanLanes::SAME && span < all; ++span) {
        float* const first = sums + span * 2 * LANES;
        const Floats both = add(load(first), load(first + LANES));
        store(first, both);
        store(biases + span * LANES, multiply(both, broadcast(-codes.offset)));
    }
    return {numbers, stride, sums, biases, spans};
}

inline bool multiply_dots(const Joined<LinearCall>& joined) {
    const LinearCall& first = joined.calls[0];
    const Plan& plan = *first.plan;
    const int64_t spans = spans_of(plan.k), rows = rows_of(joined);
    if (first.m == 0 || rows == 0) return true;
    const int threads = useful_threads(rows * spans * SPAN * first.m, first.threads);
    const Run run(plan, spans * SPAN);
    const int64_t thread_floats = DotMemory<DOT_ROWS>::size(first, run);
    const Scratch numbers(first.m * x_stride_of(spans)), sums(first.m * spans * 3 * LANES), scratch(threads * thread_floats);
    if (numbers.floats == nullptr || sums.floats == nullptr || scratch.floats == nullptr) return false;

    with_places(plan, first.dtype == DType::bfloat16, [&](const auto& codes, const auto& lanes, auto shifted) {
        const LookupX x = arrange_x(first, codes, lanes, spans, numbers.floats, sums.floats);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int part = 0; part < threads; ++part) {
            const DotMemory<DOT_ROWS> memory(first, run, scratch.floats + part * thread_floats);
            for_rows(joined, part, threads, [&](const LinearCall& call, int64_t start, int64_t stop) {
                const LookupDot work{call, x, spans};
                work.template rows<decltype(shifted)::shift>(codes, lanes, start, stop, memory);
            });
        }
    });
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

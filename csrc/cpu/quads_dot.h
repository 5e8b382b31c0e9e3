// y[M, N] = x[M, K] W^T + bias for few rows of x with AVX2: codes go from their packed bytes into fp32 products; scales, zeros and
// minima are applied to the fp32 sums of a lane's columns.
//
// A row of y depends neither on the number of threads nor on the other rows of x: each product of a row of W and a row of x is
// added up in one order.
#pragma once

#include "quads_decode.h"
#include "rows.h"

#ifdef QUANTLIB_HAS_QUADS
namespace quantlib::cpu::QUANTLIB_ISA {

// x in fp32 in the order of quads_decode.h, and its sums over each lane's columns where a format subtracts something.
struct QuadsX {
    const float* numbers;
    int64_t stride;
    const float* sums;  // [spans][2 groups][LANES]
    int64_t sums_stride;
    inline QuadsX from_row(int64_t m) const { return {numbers + m * stride, stride, sums + m * sums_stride, sums_stride}; }
};

// One row of x -> `to`, zero beyond column k; `natural` has room for whole spans.
inline void arrange_quads(const LinearCall& call, int64_t m, float* natural, float* to, float* sums) {
    const int64_t k = call.plan->k, spans = quads_of(k);
    const uint8_t* row = static_cast<const uint8_t*>(call.x) + m * call.x_row_stride * item_size(call.dtype);
    read_strided(call.dtype, row, call.x_column_stride, k, natural);
    memset(natural + k, 0, (spans * QUADS - k) * sizeof(float));
    for (int64_t span = 0; span < spans; ++span) {
        for (int g = 0; g < 2; ++g) {
            float* group = to + span * QUADS + g * 32;
            for (int i = 0; i < 32; ++i) {
                const int t = i / 8, h = i % 8 / 4, j = i % 4;
                group[i] = natural[span * QUADS + 32 * h + 16 * g + 4 * j + t];
            }
            if (sums == nullptr) continue;
            const Floats pairs[2] = {add(load(group), load(group + 8)), add(load(group + 16), load(group + 24))};
            store(sums + (span * 2 + g) * LANES, add(pairs[0], pairs[1]));
        }
    }
}

struct QuadsMemory {
    RowNumbers numbers[DOT_ROWS];
    float* values;  // [m][DOT_ROWS][WRITE_ROWS]
};

// SHIFTED: zeros and minima are subtracted. NARROW: blocks of less than 32 columns.
template <bool SHIFTED, bool NARROW, class Codes>
struct QuadsDot {
    const LinearCall& call;
    const Codes& codes;
    const QuadSpread spread;
    const QuadsX x;
    const int64_t spans;

    using Numbers = RowNumbers[DOT_ROWS];

    // total += (products - zero * sums of x) * scale - minimum * sums of x, for a group's lanes.
    template <int M>
    QUANTLIB_INLINE void apply(const Floats (&products)[DOT_ROWS][M], const Floats (&scale)[DOT_ROWS],
                               const Floats (&zeros)[DOT_ROWS], const Floats (&minima)[DOT_ROWS], const QuadsX& from,
                               int64_t lanes, Floats (&total)[DOT_ROWS][M]) const {
        for (int m = 0; m < M; ++m) {
            Floats sums = zero();
            if constexpr (SHIFTED) {
                sums = load(from.sums + m * from.sums_stride + lanes);
                if constexpr (!NARROW) sums = add(sums, load(from.sums + m * from.sums_stride + lanes - LANES));
            }
            for (int r = 0; r < DOT_ROWS; ++r) {
                if constexpr (SHIFTED) {
                    const Floats shifted = _mm256_fnmadd_ps(zeros[r], sums, products[r][m]);
                    total[r][m] = multiply_add(shifted, scale[r], total[r][m]);
                    total[r][m] = _mm256_fnmadd_ps(minima[r], sums, total[r][m]);
                } else {
                    total[r][m] = multiply_add(products[r][m], scale[r], total[r][m]);
                }
            }
        }
    }

    template <int G, int M>
    QUANTLIB_INLINE void multiply_group(const typename Codes::Loaded (&loaded)[DOT_ROWS], const QuadsX& from, int64_t span,
                                        Floats (&products)[DOT_ROWS][M]) const {
        Floats w[DOT_ROWS][GROUP_TURNS];
        for (int r = 0; r < DOT_ROWS; ++r) codes.template numbers<G>(loaded[r], w[r]);
        for (int m = 0; m < M; ++m) {
            const float* at = from.numbers + m * from.stride + span * QUADS + G * 32;
            for (int t = 0; t < GROUP_TURNS; ++t) {
                const Floats a = load(at + t * LANES);
                for (int r = 0; r < DOT_ROWS; ++r) {
                    const bool first = t == 0 && (G == 0 || NARROW);
                    products[r][m] = first ? multiply(w[r][t], a) : multiply_add(w[r][t], a, products[r][m]);
                }
            }
        }
    }

    // total[r][m] += what spans start ... stop contribute; `planes` count spans from `start`.
    template <int M>
    QUANTLIB_INLINE void add_spans(const Planes (&planes)[DOT_ROWS], const Numbers& numbers, const QuadsX& from,
                                   int64_t start, int64_t stop, Floats (&total)[DOT_ROWS][M]) const {
        for (int64_t span = start; span < stop; ++span) {
            typename Codes::Loaded loaded[DOT_ROWS];
            Floats scale[2][DOT_ROWS], zeros[2][DOT_ROWS], minima[2][DOT_ROWS], products[DOT_ROWS][M];
            for (int r = 0; r < DOT_ROWS; ++r) {
                loaded[r] = codes.load(planes[r], span - start);
                const auto spread_to = [&](const float* pieces, Floats (&to)[2][DOT_ROWS]) {
                    Floats groups[2];
                    spread.template operator()<NARROW>(pieces, span, groups);
                    to[0][r] = groups[0], to[1][r] = groups[1];
                };
                spread_to(numbers[r].scale, scale);
                if constexpr (SHIFTED) spread_to(numbers[r].zero, zeros), spread_to(numbers[r].minimum, minima);
            }
            multiply_group<0, M>(loaded, from, span, products);
            if constexpr (NARROW) apply<M>(products, scale[0], zeros[0], minima[0], from, span * 2 * LANES, total);
            multiply_group<1, M>(loaded, from, span, products);
            apply<M>(products, scale[1], zeros[1], minima[1], from, (span * 2 + 1) * LANES, total);
        }
    }

    template <int M>
    inline void some_xs(const QuadsRow (&rows)[DOT_ROWS], const Numbers& numbers, int64_t& done, float* values) const {
        for (; done + M <= call.m; done += M) {
            const QuadsX from = x.from_row(done);
            Floats total[DOT_ROWS][M];
            for (int r = 0; r < DOT_ROWS; ++r) {
                for (int m = 0; m < M; ++m) total[r][m] = zero();
            }
            const int64_t inside = least(rows[0].whole(), spans);
            const Planes planes[DOT_ROWS] = {rows[0].planes(), rows[1].planes()};
            add_spans<M>(planes, numbers, from, 0, inside, total);
            if (inside < spans) {
                const Planes tails[DOT_ROWS] = {rows[0].tail(), rows[1].tail()};
                add_spans<M>(tails, numbers, from, inside, spans, total);
            }
            float* to = values + done * DOT_ROWS * WRITE_ROWS;
            const bool damaged = codes.damaged();
            for (int m = 0; m < M; ++m) {
                for (int r = 0; r < DOT_ROWS; ++r) {
                    to[(m * DOT_ROWS + r) * WRITE_ROWS] = damaged ? __builtin_nanf("") : sum(total[r][m]);
                }
            }
        }
    }

    inline void two_rows(int64_t first, int64_t second, const QuadsMemory& memory, float* values) const {
        const Plan& plan = *call.plan;
        expand_row(plan, call.parts, first, memory.numbers[0], plan.span_piece);
        expand_row(plan, call.parts, second, memory.numbers[1], plan.span_piece);
        const QuadsRow rows[DOT_ROWS] = {{plan, call.parts, first}, {plan, call.parts, second}};
        int64_t done = 0;
        some_xs<4>(rows, memory.numbers, done, values);
        some_xs<2>(rows, memory.numbers, done, values);
        some_xs<1>(rows, memory.numbers, done, values);
    }

    void rows(int64_t start, int64_t stop, const QuadsMemory& memory) const {
        multiply_row_pairs(call, start, stop, memory.values,
                           [&](int64_t first, int64_t second, float* values) { two_rows(first, second, memory, values); });
    }
};

template <bool VALUE>
struct Truth {
    static constexpr bool value = VALUE;
};

// Call `with` the kinds of subtraction and of blocks as types.
template <class With>
inline void with_quads_kinds(bool shifted, bool narrow, With with) {
    if (shifted) return narrow ? with(Truth<true>(), Truth<true>()) : with(Truth<true>(), Truth<false>());
    return narrow ? with(Truth<false>(), Truth<true>()) : with(Truth<false>(), Truth<false>());
}

bool quads_dot(const LinearCall& call) {
    const Plan& plan = *call.plan;
    if (call.m == 0 || plan.n == 0) return true;
    const int64_t spans = quads_of(plan.k), row_floats = spans * QUADS;
    // Rows a multiple of 4096 bytes apart would all compete for the same few sets of the first-level cache.
    const int64_t stride = row_floats + LANES;
    const bool shifted = plan.has_zero || plan.has_minimum;
    const int64_t sums_stride = shifted ? spans * 2 * LANES : 0;
    const int threads = useful_threads(plan.n * row_floats * call.m, call.threads);
    const int64_t numbers_floats = round_up(numbers_size(plan), LANES);
    const int64_t thread_floats = DOT_ROWS * (numbers_floats + call.m * WRITE_ROWS);
    const Scratch arranged(call.m * stride), natural(row_floats), sums(call.m * sums_stride), own(threads * thread_floats);
    if (arranged.floats == nullptr || natural.floats == nullptr || sums.floats == nullptr || own.floats == nullptr) {
        return false;
    }
    for (int64_t m = 0; m < call.m; ++m) {
        float* lanes = shifted ? sums.floats + m * sums_stride : nullptr;
        arrange_quads(call, m, natural.floats, arranged.floats + m * stride, lanes);
    }
    with_quads(plan, call.dtype, [&](auto decoder) {
        using Codes = typename decltype(decoder)::type;
        with_quads_kinds(shifted, plan.span_piece < 32, [&](auto shifted_kind, auto narrow_kind) {
            const QuadsX x = {arranged.floats, stride, sums.floats, sums_stride};
            const QuadSpread spread(plan.span_piece);
#pragma omp parallel for schedule(static) num_threads(threads)
            for (int part = 0; part < threads; ++part) {
                const Codes codes(plan);
                const QuadsDot<decltype(shifted_kind)::value, decltype(narrow_kind)::value, Codes> work = {call, codes, spread, x,
                                                                                                          spans};
                float* floats = own.floats + part * thread_floats;
                const QuadsMemory memory = {{carve_numbers(plan, floats), carve_numbers(plan, floats + numbers_floats)},
                                            floats + DOT_ROWS * numbers_floats};
                work.rows(plan.n * part / threads, plan.n * (part + 1) / threads, memory);
            }
        });
    });
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

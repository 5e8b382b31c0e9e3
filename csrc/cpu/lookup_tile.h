// y[M, N] = x[M, K] W^T + bias for several rows of x in fp32: a block of W is decoded (the law, not rounded) into the cache, then
// multiplied by tiles of four rows of W and three of x that live in registers: seven loads serve twelve products.
//
// Sums over one block of columns are added to fp32 sums in memory, in ascending order, so that a row of y depends neither on
// threads nor on the other rows of x.
#pragma once

#include "lookup_x.h"

#ifdef QUANTLIB_HAS_LOOKUP
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int TILE_ROWS = 4, TILE_XS = 3;  // 12 sums, and room for three vectors of x and one of W
constexpr int BLOCK_ROWS = 32;
constexpr int BLOCK_SPANS = 16;
constexpr int64_t BLOCK_FLOATS = x_stride_of(BLOCK_SPANS);
constexpr int64_t BLOCK_XS = 48;  // rows of x whose columns of a block stay in the second-level cache, beside those of W

// Spans start ... stop of one row; `planes` count spans from `start`.
template <Shift SHIFT, class Codes, class SpanLanes>
QUANTLIB_INLINE void decode_spans(const Codes& codes, const SpanLanes& lanes, const Planes& planes, const RowNumbers& numbers,
                                  int64_t start, int64_t stop, int64_t ahead, float* to) {
    Ints seen = codes.start();
    float* const first = to;
    for (int64_t span = start; span < stop; ++span, to += SPAN) {
        Floats scale[2], shift[2] = {zero(), zero()};
        lanes(numbers.scale, span, scale);
        if constexpr (SHIFT == Shift::zero) lanes(numbers.zero, span, shift);
        if constexpr (SHIFT == Shift::minimum) lanes(numbers.minimum, span, shift);
        codes.numbers(planes, span - start, ahead, seen, [&](int v, Floats number) QUANTLIB_LAMBDA {
            store(to + v * LANES, scaled<SHIFT>(number, scale[v / HALF], shift[v / HALF]));
        });
    }
    if (Codes::damaged(seen)) *first = __builtin_nanf("");  // wherever it stood, every product of the row is NaN
}

// Spans start ... stop of one row of W, which may reach beyond the stored codes.
template <Shift SHIFT, class Codes, class SpanLanes>
void decode_columns(const Codes& kept, const SpanLanes& kept_lanes, const LinearCall& call, int64_t row, const RowNumbers& numbers,
                    int64_t start, int64_t stop, float* to) {
    const Codes codes = kept;  // local copies stay in registers
    const SpanLanes lanes = kept_lanes;
    const Plan& plan = *call.plan;
    const int64_t ahead = TILE_ROWS * (plan.padded_k * plan.bits / 8);
    const LookupRow packed(plan, call.parts, row);
    const int64_t inside = most(start, least(stop, packed.whole()));
    const Planes planes = moved(plan.bits, packed.planes(), start * (SPAN / CHUNK));
    decode_spans<SHIFT>(codes, lanes, planes, numbers, start, inside, ahead, to);
    if (inside < stop) {
        decode_spans<SHIFT>(codes, lanes, packed.tail(), numbers, inside, stop, 0, to + (inside - start) * SPAN);
    }
}

// sums[m * BLOCK_ROWS + r] += rows r of W times rows m of x, over `vectors` vectors.
template <int M>
void multiply_tile(const float* weights, const float* x, int64_t x_stride, int64_t vectors, float* sums) {
    Floats total[M][TILE_ROWS];
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < TILE_ROWS; ++r) total[m][r] = zero();
    }
    for (int64_t v = 0; v < vectors; ++v) {
        Floats a[M];
        for (int m = 0; m < M; ++m) a[m] = load(x + m * x_stride + v * LANES);
        for (int r = 0; r < TILE_ROWS; ++r) {
            const Floats w = load(weights + r * BLOCK_FLOATS + v * LANES);
            for (int m = 0; m < M; ++m) total[m][r] = multiply_add(w, a[m], total[m][r]);
        }
    }
    for (int m = 0; m < M; ++m) {
        float* to = sums + m * BLOCK_ROWS;
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four_sums(total[m][0], total[m][1], total[m][2], total[m][3])));
    }
}

using TileFunction = void (*)(const float*, const float*, int64_t, int64_t, float*);
constexpr TileFunction TILES[TILE_XS + 1] = {nullptr, multiply_tile<1>, multiply_tile<2>, multiply_tile<3>};

// What one thread works in.
struct TileMemory {
    float* weights;  // [BLOCK_ROWS][BLOCK_FLOATS]
    float* sums;     // [m][BLOCK_ROWS]
    float* numbers;  // those of BLOCK_ROWS rows
};

struct LookupTile {
    const LinearCall& call;
    const float* x;
    int64_t x_stride, spans, numbers_floats;

    inline void multiply(int64_t rows, int64_t start, int64_t stop, const TileMemory& memory) const {
        const int64_t vectors = (stop - start) * SPAN_VECTORS;
        for (int64_t block = 0; block < call.m; block += BLOCK_XS) {
            const int64_t end = least(call.m, block + BLOCK_XS);
            for (int64_t r = 0; r < rows; r += TILE_ROWS) {
                for (int64_t m = block; m < end; m += TILE_XS) {
                    TILES[least(TILE_XS, end - m)](memory.weights + r * BLOCK_FLOATS, x + m * x_stride + start * SPAN, x_stride,
                                                   vectors, memory.sums + m * BLOCK_ROWS + r);
                }
            }
        }
    }

    // Few rows of x: as many rows of W as a tile takes, so that they are still in the first-level cache; else BLOCK_ROWS.
    inline int64_t rows_at_once() const { return call.m <= 4 * TILE_XS ? TILE_ROWS : BLOCK_ROWS; }

    void rows(int64_t from, int64_t to, const TileMemory& memory) const {
        const Plan& plan = *call.plan;
        const int64_t step = rows_at_once();
        RowNumbers numbers[BLOCK_ROWS];
        for (int r = 0; r < BLOCK_ROWS; ++r) numbers[r] = carve_numbers(plan, memory.numbers + r * numbers_floats);
        memset(memory.weights, 0, BLOCK_ROWS * BLOCK_FLOATS * sizeof(float));
        with_lookup(plan, false, [&](auto codes, auto lanes, auto shifted) {
            constexpr Shift SHIFT = decltype(shifted)::shift;
            for (int64_t row = from; row < to; row += step) {
                const int64_t count = least(step, to - row);
                for (int64_t r = 0; r < count; ++r) expand_lookup(plan, call.parts, row + r, 1, Run(), codes.unit, numbers[r]);
                memset(memory.sums, 0, call.m * BLOCK_ROWS * sizeof(float));
                for (int64_t start = 0; start < spans; start += BLOCK_SPANS) {
                    const int64_t stop = least(spans, start + BLOCK_SPANS);
                    for (int64_t r = 0; r < count; ++r) {
                        decode_columns<SHIFT>(codes, lanes, call, row + r, numbers[r], start, stop,
                                              memory.weights + r * BLOCK_FLOATS);
                    }
                    multiply(count, start, stop, memory);
                }
                write_products(call, row, count, memory.sums, BLOCK_ROWS);
            }
        });
    }
};

inline bool multiply_tiles(const LinearCall& call) {
    const Plan& plan = *call.plan;
    if (call.m == 0 || plan.n == 0) return true;
    const int64_t spans = spans_of(plan.k), x_stride = x_stride_of(spans);
    const int threads = useful_threads(plan.n * spans * SPAN * call.m, call.threads);
    const int64_t numbers_floats = round_up(numbers_size(plan), LANES);
    const int64_t weight_floats = BLOCK_ROWS * BLOCK_FLOATS, sums_floats = call.m * BLOCK_ROWS;
    const int64_t thread_floats = weight_floats + sums_floats + BLOCK_ROWS * numbers_floats;
    const Scratch numbers(call.m * x_stride), scratch(threads * thread_floats);
    if (numbers.floats == nullptr || scratch.floats == nullptr) return false;

    with_lookup(plan, false, [&](auto codes, auto, auto) {
        const Order order(codes);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t m = 0; m < call.m; ++m) arrange_row(call, order, m, spans, numbers.floats + m * x_stride);
    });

    const LookupTile work{call, numbers.floats, x_stride, spans, numbers_floats};
    const int64_t tiles = (plan.n + TILE_ROWS - 1) / TILE_ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        float* own = scratch.floats + part * thread_floats;
        const TileMemory memory = {own, own + weight_floats, own + weight_floats + sums_floats};
        work.rows(tiles * part / threads * TILE_ROWS, least(plan.n, tiles * (part + 1) / threads * TILE_ROWS), memory);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

// y[M, N] = x[M, K] W^T + bias in bf16 for many rows of x: a block of W is decoded to bf16 (the law in fp32, rounded once) into the
// second-level cache, then multiplied by tiles of four rows of W and six of x that live in registers.
//
// Words of a decoded vector: the even ones of a span's vector first, then the odd ones, which is how fp32 products come apart;
// x lies in the same order (pairs_x.h). Sums over one block of columns are added to fp32 sums in memory, in ascending order, so
// that a row of y depends neither on threads nor on the other rows of x.
#pragma once

#include "pairs_x.h"
#include "rows.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int TILE_ROWS = 4, TILE_XS = 6;  // 24 sums, and room for four vectors of W and one of x
constexpr int BLOCK_ROWS = 64;
constexpr int BLOCK_SPANS = 16;
// Rows a multiple of 4096 bytes apart would all compete for the same few sets of the first-level cache.
constexpr int64_t BLOCK_WORDS = BLOCK_SPANS * SPAN + WORDS;

// Spans start ... stop of one row, rounded to bf16; `planes` count spans from `start`.
template <Shift SHIFT, class Codes>
QUANTLIB_INLINE void decode_spans(const Codes& codes, const Spread& spread, const Planes& planes, const RowNumbers& numbers, int64_t start,
                         int64_t stop, uint16_t* to) {
    for (int64_t span = start; span < stop; ++span, to += SPAN) {
        Words w[TURNS];
        codes.numbers(planes, span - start, w);
        const Floats scale = spread(numbers.scale, span);
        Floats shift = zero();
        if constexpr (SHIFT == Shift::zero) shift = spread(numbers.zero, span);
        if constexpr (SHIFT == Shift::minimum) shift = spread(numbers.minimum, span);
        for (int turn = 0; turn < TURNS; ++turn) {
            const Floats even = scaled<SHIFT>(low_floats(w[turn]), scale, shift);
            const Floats odd = scaled<SHIFT>(high_floats(w[turn]), scale, shift);
            store_words(to + turn * WORDS, round_words(even, odd));
        }
    }
}

// Spans start ... stop of one row of W, which may reach beyond the stored codes.
template <Shift SHIFT, class Codes>
inline void decode_columns(const Codes& codes, const Spread& spread, const LinearCall& call, int64_t row, int64_t start,
                           int64_t stop, uint16_t* to, const RowNumbers& numbers) {
    const Plan& plan = *call.plan;
    expand_row(plan, call.parts, row, numbers, plan.span_piece);
    const PairsRow packed(plan, call.parts, row);
    const int64_t inside = most(start, least(stop, packed.whole()));
    const Planes planes = moved(plan.bits, packed.planes(), start * (SPAN / CHUNK));
    decode_spans<SHIFT>(codes, spread, planes, numbers, start, inside, to);
    if (inside < stop) decode_spans<SHIFT>(codes, spread, packed.tail(), numbers, inside, stop, to + (inside - start) * SPAN);
}

// sums[m * sums_stride + r] += rows r of W times rows m of x, over `vectors` vectors of words.
template <int M>
void multiply_tile(const uint16_t* weights, const uint16_t* x, int64_t x_stride, int64_t vectors, float* sums,
                   int64_t sums_stride) {
    Floats total[M][TILE_ROWS];
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < TILE_ROWS; ++r) total[m][r] = zero();
    }
    for (int64_t v = 0; v < vectors; ++v) {
        Words w[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; ++r) w[r] = load_words(weights + r * BLOCK_WORDS + v * WORDS);
        for (int m = 0; m < M; ++m) {
            const Words a = load_words(x + m * x_stride + v * WORDS);
            for (int r = 0; r < TILE_ROWS; ++r) total[m][r] = dot(total[m][r], w[r], a);
        }
    }
    for (int m = 0; m < M; ++m) {
        float* to = sums + m * sums_stride;
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four_sums(total[m][0], total[m][1], total[m][2], total[m][3])));
    }
}

using TileFunction = void (*)(const uint16_t*, const uint16_t*, int64_t, int64_t, float*, int64_t);
constexpr TileFunction TILES[TILE_XS + 1] = {nullptr,          multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                                             multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};

// What one thread works in.
struct TileMemory {
    uint16_t* weights;  // [BLOCK_ROWS][BLOCK_WORDS]
    float* sums;        // [m][BLOCK_ROWS]
    RowNumbers numbers;
};

struct PairsTile {
    const LinearCall& call;
    const uint16_t* x;
    int64_t x_stride, spans;

    // Rows of W, then zeros up to a whole tile.
    template <Shift SHIFT, class Codes>
    inline void decode(const Codes& codes, int64_t row, int64_t rows, int64_t start, int64_t stop, const TileMemory& memory) const {
        const Spread spread(*call.plan);
        for (int64_t r = 0; r < rows; ++r) {
            decode_columns<SHIFT>(codes, spread, call, row + r, start, stop, memory.weights + r * BLOCK_WORDS, memory.numbers);
        }
        const int64_t tiles = round_up(rows, TILE_ROWS);
        memset(memory.weights + rows * BLOCK_WORDS, 0, (tiles - rows) * BLOCK_WORDS * sizeof(uint16_t));
    }

    inline void multiply(int64_t rows, int64_t start, int64_t stop, const TileMemory& memory) const {
        const int64_t vectors = (stop - start) * TURNS;
        for (int64_t m = 0; m < call.m; m += TILE_XS) {
            const TileFunction tile = TILES[least(TILE_XS, call.m - m)];
            for (int64_t r = 0; r < rows; r += TILE_ROWS) {
                tile(memory.weights + r * BLOCK_WORDS, x + m * x_stride + start * SPAN, x_stride, vectors,
                     memory.sums + m * BLOCK_ROWS + r, BLOCK_ROWS);
            }
        }
    }

    void rows(int64_t from, int64_t to, const TileMemory& memory) const {
        with_decoder(*call.plan, [&](const auto& codes, auto shifted) {
            for (int64_t row = from; row < to; row += BLOCK_ROWS) {
                const int64_t count = least(BLOCK_ROWS, to - row);
                memset(memory.sums, 0, call.m * BLOCK_ROWS * sizeof(float));
                for (int64_t start = 0; start < spans; start += BLOCK_SPANS) {
                    const int64_t stop = least(spans, start + BLOCK_SPANS);
                    this->template decode<decltype(shifted)::shift>(codes, row, count, start, stop, memory);
                    multiply(count, start, stop, memory);
                }
                write_products(call, row, count, memory.sums, BLOCK_ROWS);
            }
        });
    }
};

inline bool pairs_tile(const LinearCall& call) {
    const Plan& plan = *call.plan;
    if (call.m == 0 || plan.n == 0) return true;
    const int64_t spans = spans_of(plan.k);
    const int threads = useful_threads(plan.n * spans * SPAN * call.m, call.threads);
    const int64_t numbers_floats = round_up(numbers_size(plan), LANES);
    const int64_t weight_floats = BLOCK_ROWS * BLOCK_WORDS / 2, sums_floats = call.m * BLOCK_ROWS;
    const int64_t thread_floats = weight_floats + sums_floats + numbers_floats;
    const int64_t x_stride = spans * SPAN + WORDS;
    const Scratch words(call.m * x_stride / 2), scratch(threads * thread_floats);
    if (words.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* x = reinterpret_cast<uint16_t*>(words.floats);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t m = 0; m < call.m; ++m) arrange_row<true>(call, m, spans, x + m * x_stride);

    const PairsTile work{call, x, x_stride, spans};
    const int64_t tiles = (plan.n + TILE_ROWS - 1) / TILE_ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        float* own = scratch.floats + part * thread_floats;
        const TileMemory memory = {reinterpret_cast<uint16_t*>(own), own + weight_floats,
                                   carve_numbers(plan, own + weight_floats + sums_floats)};
        work.rows(tiles * part / threads * TILE_ROWS, least(plan.n, tiles * (part + 1) / threads * TILE_ROWS), memory);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

// y[M, N] = x[M, K] W^T + bias in bf16 for many rows of x: a block of W is decoded to bf16 (the law in fp32, rounded once) into the
// second-level cache, then multiplied by tiles of four rows of W and six of x that live in registers.
//
// x lies in the order of decoded words, parted or not (pairs_round.h). Sums over one block of columns are added to fp32 sums in memory,
// in ascending order, so that a row of y depends neither on threads nor on the other rows of x.
#pragma once

#include "pairs_round.h"
#include "pairs_x.h"
#include "strips.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int TILE_ROWS = 4, TILE_XS = 6;  // 24 sums, and room for four vectors of W and one of x
constexpr int BLOCK_ROWS = 64;
constexpr int BLOCK_SPANS = 16;
// Rows a multiple of 4096 bytes apart would all compete for the same few sets of the first-level cache.
constexpr int64_t BLOCK_WORDS = BLOCK_SPANS * SPAN + WORDS;

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
#pragma GCC unroll 8  // else the sums go through memory
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
    BlockNumbers numbers;
    PartRows rows;  // BLOCK_ROWS of them
};

struct PairsTile {
    const LinearCall& call;
    const uint16_t* x;
    int64_t x_stride, spans;

    // Rows of W, then zeros up to a whole tile.
    template <class Decoder>
    inline void decode(const Decoder& decoder, int64_t row, int64_t rows, int64_t start, int64_t stop,
                       const TileMemory& memory) const {
        const Parts parts = memory.rows.codes(call.parts, row, rows, start * SPAN, stop * SPAN);
        for (int64_t r = 0; r < rows; ++r) {
            decode_columns(decoder, *call.plan, parts, row + r, start, stop, memory.weights + r * BLOCK_WORDS, memory.numbers.of(r));
        }
        const int64_t tiles = round_up(rows, TILE_ROWS);
        memset(memory.weights + rows * BLOCK_WORDS, 0, (tiles - rows) * BLOCK_WORDS * sizeof(uint16_t));
    }

    inline void multiply(int64_t rows, int64_t start, int64_t stop, const TileMemory& memory) const {
        const int64_t vectors = (stop - start) * TURNS;
        const int64_t tiles = (call.m + TILE_XS - 1) / TILE_XS;  // of about one height: low ones wait for their sums
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t m = call.m * t / tiles, next = call.m * (t + 1) / tiles;
            const TileFunction tile = TILES[next - m];
            for (int64_t r = 0; r < rows; r += TILE_ROWS) {
                tile(memory.weights + r * BLOCK_WORDS, x + m * x_stride + start * SPAN, x_stride, vectors,
                     memory.sums + m * BLOCK_ROWS + r, BLOCK_ROWS);
            }
        }
    }

    void rows(int64_t from, int64_t to, const TileMemory& memory) const {
        with_rounding_decoder(*call.plan, [&](const auto& decoder) {
            for (int64_t row = from; row < to; row += BLOCK_ROWS) {
                const int64_t count = least(BLOCK_ROWS, to - row);
                memory.numbers.expand(memory.rows.numbers(call.parts, row, count), row, count);
                memset(memory.sums, 0, call.m * BLOCK_ROWS * sizeof(float));
                for (int64_t start = 0; start < spans; start += BLOCK_SPANS) {
                    const int64_t stop = least(spans, start + BLOCK_SPANS);
                    this->decode(decoder, row, count, start, stop, memory);
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
    const BlockNumbers numbers(plan, least(plan.padded_k, spans * SPAN), BLOCK_ROWS);
    const int64_t weight_floats = BLOCK_ROWS * BLOCK_WORDS / 2, sums_floats = call.m * BLOCK_ROWS;
    const int64_t number_floats = round_up(numbers.floats(), LANES);
    const int64_t thread_floats = weight_floats + sums_floats + number_floats + PartRows::floats(plan, BLOCK_ROWS);
    const int64_t x_stride = spans * SPAN + WORDS;
    const Scratch words(call.m * x_stride / 2), scratch(threads * thread_floats);
    if (words.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* x = reinterpret_cast<uint16_t*>(words.floats);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t m = 0; m < call.m; ++m) arrange_row(call, m, spans, parted(plan), x + m * x_stride);

    const PairsTile work{call, x, x_stride, spans};
    const int64_t share = share_of(plan, TILE_ROWS);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        float* own = scratch.floats + part * thread_floats;
        float* sums = own + weight_floats;
        float* placed = sums + sums_floats;
        const TileMemory memory = {reinterpret_cast<uint16_t*>(own), sums, numbers.in(placed), {plan, placed + number_floats, BLOCK_ROWS}};
        work.rows(share_start(plan.n, share, part, threads), share_start(plan.n, share, part + 1, threads), memory);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

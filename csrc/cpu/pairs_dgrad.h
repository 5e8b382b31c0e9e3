// dX[M, K] = dY[M, N] W in bf16: the sum runs over rows of W, so that two of them make a pair. Decoded words of rows n and n + 1
// (the law in fp32, rounded once) are interleaved column by column; a tile of six rows of dY and 64 columns lives in registers,
// and sums over one block of rows are added to fp32 sums in memory, in ascending order.
#pragma once

#include "pairs_tile.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int DGRAD_ROWS = 128;                // rows of W that are decoded together
constexpr int DGRAD_PAIRS = DGRAD_ROWS / 2;
constexpr int DGRAD_SPANS = 16;                // columns of a block: 16 * 128
constexpr int DGRAD_VECTORS = 4;               // of 16 columns: a tile is half a span
constexpr int64_t PAIR_WORDS = DGRAD_VECTORS * WORDS;
constexpr int64_t HALF_WORDS = DGRAD_PAIRS * PAIR_WORDS;
constexpr int64_t BLOCK_COLUMNS = DGRAD_SPANS * SPAN;

// The column, within its span, of lane `lane` of vector `vector` of a half.
inline int column_of(int half, int vector, int lane) {
    const int turn = half * 2 + vector / 2;
    const int word = lane / 4 * 8 + vector % 2 * 4 + lane % 4;  // where unpacking took it from
    return word < LANES ? 8 * word + turn : 8 * (word - LANES) + 4 + turn;
}

// sums[m][...] += dY's rows m times `pairs` pairs of rows of W. dY: two neighbouring words are a pair.
template <int M>
void dgrad_tile(const uint16_t* weights, const uint16_t* dy, int64_t dy_stride, int64_t pairs, float* sums, int64_t sums_stride) {
    Floats total[M][DGRAD_VECTORS];
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < DGRAD_VECTORS; ++v) total[m][v] = load(sums + m * sums_stride + v * LANES);
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
        Words w[DGRAD_VECTORS];
        for (int v = 0; v < DGRAD_VECTORS; ++v) w[v] = load_words(weights + pair * PAIR_WORDS + v * WORDS);
        for (int m = 0; m < M; ++m) {
            const Words a = same_pairs(dy + m * dy_stride + pair * 2);
            for (int v = 0; v < DGRAD_VECTORS; ++v) total[m][v] = dot(total[m][v], w[v], a);
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < DGRAD_VECTORS; ++v) store(sums + m * sums_stride + v * LANES, total[m][v]);
    }
}

constexpr TileFunction DGRAD_TILES[TILE_XS + 1] = {nullptr,       dgrad_tile<1>, dgrad_tile<2>, dgrad_tile<3>,
                                                   dgrad_tile<4>, dgrad_tile<5>, dgrad_tile<6>};

struct DgradMemory {
    uint16_t* weights;  // [DGRAD_SPANS][2][DGRAD_PAIRS][PAIR_WORDS]
    uint16_t* rows;     // two rows, as decode_spans leaves them
    float* sums;        // [m][BLOCK_COLUMNS]
    RowNumbers numbers;
};

struct PairsDgrad {
    const LinearCall& call;
    const uint16_t* dy;
    int64_t dy_stride;

    // One row's spans; zeros where the row lies beyond the last.
    template <Shift SHIFT, class Codes>
    inline void decode_row(const Codes& codes, const Spread& spread, int64_t row, int64_t start, int64_t stop, uint16_t* to,
                           const DgradMemory& memory) const {
        const Plan& plan = *call.plan;
        if (row >= plan.n) {
            memset(to, 0, (stop - start) * SPAN * sizeof(uint16_t));
            return;
        }
        decode_columns<SHIFT>(codes, spread, call, row, start, stop, to, memory.numbers);
    }

    template <Shift SHIFT, class Codes>
    inline void decode(const Codes& codes, int64_t row, int64_t pairs, int64_t start, int64_t stop,
                       const DgradMemory& memory) const {
        const Spread spread(*call.plan);
        uint16_t *first = memory.rows, *second = memory.rows + BLOCK_COLUMNS;
        for (int64_t pair = 0; pair < pairs; ++pair) {
            decode_row<SHIFT>(codes, spread, row + 2 * pair, start, stop, first, memory);
            decode_row<SHIFT>(codes, spread, row + 2 * pair + 1, start, stop, second, memory);
            for (int64_t vector = 0; vector < (stop - start) * TURNS; ++vector) {
                const Words a = load_words(first + vector * WORDS), b = load_words(second + vector * WORDS);
                uint16_t* to = memory.weights + vector / 2 * HALF_WORDS + pair * PAIR_WORDS + vector % 2 * (2 * WORDS);
                store_words(to, low_pairs(a, b));
                store_words(to + WORDS, high_pairs(a, b));
            }
        }
    }

    inline void multiply(int64_t row, int64_t pairs, int64_t spans, const DgradMemory& memory) const {
        for (int64_t half = 0; half < 2 * spans; ++half) {
            for (int64_t m = 0; m < call.m; m += TILE_XS) {
                DGRAD_TILES[least(TILE_XS, call.m - m)](memory.weights + half * HALF_WORDS, dy + m * dy_stride + row, dy_stride,
                                                        pairs, memory.sums + m * BLOCK_COLUMNS + half * (SPAN / 2), BLOCK_COLUMNS);
            }
        }
    }

    // Sums of `spans` spans from column `column` on, brought into their order.
    inline void write(int64_t column, int64_t spans, const float* sums) const {
        const int64_t k = call.plan->k;
        uint8_t* dx = static_cast<uint8_t*>(call.y);
        for (int64_t m = 0; m < call.m; ++m) {
            for (int64_t span = 0; span < spans; ++span) {
                float ordered[SPAN];
                const float* from = sums + m * BLOCK_COLUMNS + span * SPAN;
                for (int half = 0; half < 2; ++half) {
                    for (int i = 0; i < SPAN / 2; ++i, ++from) ordered[column_of(half, i / LANES, i % LANES)] = *from;
                }
                const int64_t at = column + span * SPAN;
                write_numbers(call.dtype, ordered, least(SPAN, k - at), dx + (m * k + at) * item_size(call.dtype));
            }
        }
    }

    void spans(int64_t from, int64_t to, const DgradMemory& memory) const {
        with_decoder(*call.plan, [&](const auto& codes, auto shifted) {
            for (int64_t start = from; start < to; start += DGRAD_SPANS) {
                const int64_t stop = least(to, start + DGRAD_SPANS);
                memset(memory.sums, 0, call.m * BLOCK_COLUMNS * sizeof(float));
                for (int64_t row = 0; row < call.plan->n; row += DGRAD_ROWS) {
                    const int64_t pairs = (least(DGRAD_ROWS, call.plan->n - row) + 1) / 2;
                    this->template decode<decltype(shifted)::shift>(codes, row, pairs, start, stop, memory);
                    multiply(row, pairs, stop - start, memory);
                }
                write(start * SPAN, stop - start, memory.sums);
            }
        });
    }
};

// x of the call is dY [m, n], y is dX [m, k]; both bf16.
inline bool pairs_dgrad(const LinearCall& call) {
    const Plan& plan = *call.plan;
    if (call.m == 0 || plan.k == 0) return true;
    const int64_t spans = spans_of(plan.k);
    const int threads = int(least(spans, useful_threads(plan.n * spans * SPAN * call.m, call.threads)));
    const int64_t numbers_floats = round_up(numbers_size(plan), LANES);
    const int64_t weight_floats = DGRAD_SPANS * 2 * HALF_WORDS / 2, row_floats = BLOCK_COLUMNS, sums_floats = call.m * BLOCK_COLUMNS;
    const int64_t thread_floats = weight_floats + row_floats + sums_floats + numbers_floats;
    const int64_t dy_stride = round_up(plan.n, WORDS) + WORDS;
    const Scratch words(call.m * dy_stride / 2), scratch(threads * thread_floats);
    if (words.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* dy = reinterpret_cast<uint16_t*>(words.floats);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t m = 0; m < call.m; ++m) {
        const uint8_t* from = static_cast<const uint8_t*>(call.x) + m * call.x_row_stride * 2;
        uint16_t* to = dy + m * dy_stride;
        if (call.x_column_stride == 1) {
            memcpy(to, from, plan.n * 2);
        } else {
            for (int64_t n = 0; n < plan.n; ++n) memcpy(to + n, from + n * call.x_column_stride * 2, 2);
        }
        memset(to + plan.n, 0, (dy_stride - plan.n) * 2);
    }

    const PairsDgrad work{call, dy, dy_stride};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        float* own = scratch.floats + part * thread_floats;
        float* rows = own + weight_floats;
        float* sums = rows + row_floats;
        const DgradMemory memory = {reinterpret_cast<uint16_t*>(own), reinterpret_cast<uint16_t*>(rows), sums,
                                    carve_numbers(plan, sums + sums_floats)};
        work.spans(spans * part / threads, spans * (part + 1) / threads, memory);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

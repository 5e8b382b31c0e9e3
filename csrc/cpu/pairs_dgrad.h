// dX[M, K] = dY[M, N] W in bf16: the sum runs over rows of W, so that two of them make a pair. Decoded words of rows n and n + 1
// (the law in fp32, rounded once) are interleaved column by column; a tile of six rows of dY and 64 columns lives in registers,
// and sums over one block of rows are added to fp32 sums in memory, in ascending order.
#pragma once

#include "pairs_tile.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int DGRAD_VECTORS = 4;  // of 16 columns: half a span
constexpr int64_t PAIR_WORDS = DGRAD_VECTORS * WORDS;

// A block of W that is decoded together: rows and spans.
template <int ROWS_, int SPANS_>
struct DgradBlock {
    static constexpr int ROWS = ROWS_, SPANS = SPANS_, PAIRS = ROWS / 2;
    // Sums a multiple of 4096 bytes apart would all compete for the same few sets of the first-level cache.
    static constexpr int64_t COLUMNS = SPANS * SPAN, STRIDE = COLUMNS + LANES, HALF_WORDS = PAIRS * PAIR_WORDS;
};

// The column, within its span, of lane `lane` of vector `vector` of a half.
inline int column_of(bool parted, int half, int vector, int lane) {
    const int turn = half * 2 + vector / 2;
    const int word = lane / 4 * 8 + vector % 2 * 4 + lane % 4;  // where unpacking took it from
    if (!parted) return 4 * word + turn;
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

// What one thread works in.
struct DgradMemory {
    uint16_t* weights;  // [SPANS][2][PAIRS][PAIR_WORDS]
    uint16_t* rows;     // two rows, as a decoder leaves them
    float* sums;        // [m][STRIDE]
    BlockNumbers numbers;
    PartRows whole;  // Block::ROWS of them
};

// Who multiplies a block: sums[m][STRIDE] += dY's columns from `row` on times `pairs` pairs of rows of W, of `spans` spans. There is
// room for a multiple of WHOLE_ROWS rows of dY, and `pairs` is a multiple of WHOLE_PAIRS; rows of W beyond the last are zero.
struct MultiplyPairs {
    using Block = DgradBlock<128, 16>;
    static constexpr int WHOLE_ROWS = 1, WHOLE_PAIRS = 1;
    // Where words n ... n + WORDS - 1 of row m of dY lie.
    static int64_t place(int64_t m, int64_t n, int64_t dy_stride) { return m * dy_stride + n; }
    const LinearCall& call;
    const uint16_t* dy;
    int64_t dy_stride;

    void operator()(int64_t row, int64_t pairs, int64_t spans, const DgradMemory& memory) const {
        for (int64_t half = 0; half < 2 * spans; ++half) {
            for (int64_t m = 0; m < call.m; m += TILE_XS) {
                DGRAD_TILES[least(TILE_XS, call.m - m)](memory.weights + half * Block::HALF_WORDS, dy + m * dy_stride + row,
                                                        dy_stride, pairs, memory.sums + m * Block::STRIDE + half * (SPAN / 2),
                                                        Block::STRIDE);
            }
        }
    }
};

template <class Multiply>
struct Dgrad {
    using Block = typename Multiply::Block;
    const LinearCall& call;
    const Multiply multiply;

    // One row's spans; zeros where the row lies beyond the last.
    template <class Decoder>
    inline void decode_row(const Decoder& decoder, const Parts& parts, int64_t row, int64_t r, int64_t start, int64_t stop, uint16_t* to,
                           const DgradMemory& memory) const {
        if (row + r >= call.plan->n) {
            memset(to, 0, (stop - start) * SPAN * sizeof(uint16_t));
            return;
        }
        decode_columns(decoder, *call.plan, parts, row + r, start, stop, to, memory.numbers.of(r));
    }

    template <class Decoder>
    inline void decode(const Decoder& decoder, int64_t row, int64_t pairs, int64_t start, int64_t stop,
                       const DgradMemory& memory) const {
        uint16_t *first = memory.rows, *second = memory.rows + Block::COLUMNS;
        const int64_t rows = least(2 * pairs, call.plan->n - row);
        const Parts parts = memory.whole.codes(call.parts, row, rows, start * SPAN, stop * SPAN);
        memory.numbers.expand(memory.whole.numbers(call.parts, row, rows), row, rows);
        for (int64_t pair = 0; pair < pairs; ++pair) {
            decode_row(decoder, parts, row, 2 * pair, start, stop, first, memory);
            decode_row(decoder, parts, row, 2 * pair + 1, start, stop, second, memory);
            for (int64_t vector = 0; vector < (stop - start) * TURNS; ++vector) {
                const Words a = load_words(first + vector * WORDS), b = load_words(second + vector * WORDS);
                uint16_t* to = memory.weights + vector / 2 * Block::HALF_WORDS + pair * PAIR_WORDS + vector % 2 * (2 * WORDS);
                store_words(to, low_pairs(a, b));
                store_words(to + WORDS, high_pairs(a, b));
            }
        }
    }

    // Sums of `spans` spans from column `column` on, brought into their order.
    inline void write(int64_t column, int64_t spans, const float* sums) const {
        const int64_t k = call.plan->k;
        const bool apart = parted(*call.plan);
        uint8_t* dx = static_cast<uint8_t*>(call.y);
        for (int64_t m = 0; m < call.m; ++m) {
            for (int64_t span = 0; span < spans; ++span) {
                float ordered[SPAN];
                const float* from = sums + m * Block::STRIDE + span * SPAN;
                for (int half = 0; half < 2; ++half) {
                    for (int i = 0; i < SPAN / 2; ++i, ++from) ordered[column_of(apart, half, i / LANES, i % LANES)] = *from;
                }
                const int64_t at = column + span * SPAN;
                write_numbers(call.dtype, ordered, least(SPAN, k - at), dx + (m * k + at) * item_size(call.dtype));
            }
        }
    }

    void spans(int64_t from, int64_t to, const DgradMemory& memory) const {
        with_rounding_decoder(*call.plan, [&](const auto& decoder) {
            for (int64_t start = from; start < to; start += Block::SPANS) {
                const int64_t stop = least(to, start + Block::SPANS);
                memset(memory.sums, 0, round_up(call.m, Multiply::WHOLE_ROWS) * Block::STRIDE * sizeof(float));
                for (int64_t row = 0; row < call.plan->n; row += Block::ROWS) {
                    const int64_t pairs = round_up((least(Block::ROWS, call.plan->n - row) + 1) / 2, Multiply::WHOLE_PAIRS);
                    this->decode(decoder, row, pairs, start, stop, memory);
                    multiply(row, pairs, stop - start, memory);
                }
                write(start * SPAN, stop - start, memory.sums);
            }
        });
    }
};

// x of the call is dY [m, n], y is dX [m, k]; both bf16.
template <class Multiply>
inline bool dgrad(const LinearCall& call) {
    using Block = typename Multiply::Block;
    const Plan& plan = *call.plan;
    if (call.m == 0 || plan.k == 0) return true;
    const int64_t spans = spans_of(plan.k);
    const int threads = int(least(spans, useful_threads(plan.n * spans * SPAN * call.m, call.threads)));
    const BlockNumbers numbers(plan, least(plan.padded_k, spans * SPAN), Block::ROWS);
    const int64_t whole_rows = round_up(call.m, Multiply::WHOLE_ROWS);
    const int64_t weight_floats = Block::SPANS * 2 * Block::HALF_WORDS / 2, row_floats = Block::COLUMNS;
    const int64_t sums_floats = whole_rows * Block::STRIDE;
    const int64_t number_floats = round_up(numbers.floats(), LANES);
    const int64_t thread_floats = weight_floats + row_floats + sums_floats + number_floats + PartRows::floats(plan, Block::ROWS);
    const int64_t dy_stride = round_up(plan.n, WORDS) + WORDS;
    const Scratch words(whole_rows * dy_stride / 2), scratch(threads * thread_floats);
    if (words.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* dy = reinterpret_cast<uint16_t*>(words.floats);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t m = 0; m < call.m; ++m) {
        const uint8_t* from = static_cast<const uint8_t*>(call.x) + m * call.x_row_stride * 2;
        for (int64_t start = 0; start < dy_stride; start += WORDS) {
            uint16_t* to = dy + Multiply::place(m, start, dy_stride);
            const int64_t count = most(0, least(WORDS, plan.n - start));
            if (call.x_column_stride == 1) {
                memcpy(to, from + start * 2, count * 2);
            } else {
                for (int64_t i = 0; i < count; ++i) memcpy(to + i, from + (start + i) * call.x_column_stride * 2, 2);
            }
            memset(to + count, 0, (WORDS - count) * 2);
        }
    }

    const Dgrad<Multiply> work{call, {call, dy, dy_stride}};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        float* own = scratch.floats + part * thread_floats;
        float* rows = own + weight_floats;
        float* sums = rows + row_floats;
        float* placed = sums + sums_floats;
        const DgradMemory memory = {reinterpret_cast<uint16_t*>(own), reinterpret_cast<uint16_t*>(rows), sums, numbers.in(placed),
                                    {plan, placed + number_floats, Block::ROWS}};
        work.spans(spans * part / threads, spans * (part + 1) / threads, memory);
    }
    return true;
}

inline bool pairs_dgrad(const LinearCall& call) { return dgrad<MultiplyPairs>(call); }

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

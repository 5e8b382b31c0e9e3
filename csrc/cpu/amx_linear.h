// y[M, N] = x[M, K] W^T + bias in bf16 for many rows of x, in tile registers: a block of W is decoded to bf16 (pairs_round.h), and 32 of
// its rows are multiplied by 32 rows of x at a time. x lies in tiles, made once per call: lane m of row p of a tile is the pair of
// words p of row m of x.
//
// Sums over one block of columns are added to fp32 sums in memory, in ascending order, so that a row of y depends neither on
// threads nor on the other rows of x.
#pragma once

#include "pairs_tile.h"
#include "simd_amx.h"

#ifdef QUANTLIB_HAS_TILES
namespace quantlib::cpu::QUANTLIB_ISA {

// Rows and columns that are decoded together: they fill half of a second-level cache of 1 MB, and 32 rows of x of as many columns
// stay in the first-level cache while rows of W pass by.
constexpr int AMX_ROWS = 256;
constexpr int AMX_SPANS = 4;
// Rows a multiple of 4096 bytes apart would all compete for the same few sets of the first-level cache.
constexpr int64_t AMX_ROW_WORDS = AMX_SPANS * SPAN + WORDS;

// What one thread works in.
struct AmxMemory {
    uint16_t* weights;  // [AMX_ROWS][AMX_ROW_WORDS]
    float* sums;        // [AMX_ROWS / TILE][tiles of x] tiles: row r of W, lane m of x
    float* products;    // [TILE][AMX_ROWS]: one tile of x, on its way to y
    BlockNumbers numbers;
};

// Rows TILE * tile ... of x as tiles, zero where there are none; `rows` holds [TILE][spans * SPAN] words of scratch.
inline void arrange_tiles(const LinearCall& call, int64_t tile, int64_t spans, uint16_t* rows, uint16_t* to) {
    const int64_t row_words = spans * SPAN + WORDS, count = least(TILE, call.m - tile * TILE);
    for (int64_t r = 0; r < TILE; ++r) {
        if (r < count) arrange_row(call, tile * TILE + r, spans, parted(*call.plan), rows + r * row_words);
        else memset(rows + r * row_words, 0, spans * SPAN * sizeof(uint16_t));
    }
    for (int64_t v = 0; v < spans * TURNS; ++v) {
        Words square[TILE];
        for (int r = 0; r < TILE; ++r) square[r] = load_words(rows + r * row_words + v * WORDS);
        transpose(square);
        for (int p = 0; p < TILE; ++p) store_words(to + v * TILE_WORDS + p * WORDS, square[p]);
    }
}

struct AmxLinear {
    const LinearCall& call;
    const uint16_t* x;  // [tiles of x][spans * TURNS] tiles
    int64_t spans;

    int64_t x_tiles() const { return tiles_of(call.m); }

    // Rows of W, then zeros up to a whole tile.
    template <class Decoder>
    inline void decode(const Decoder& decoder, int64_t row, int64_t rows, int64_t start, int64_t stop,
                       const AmxMemory& memory) const {
        for (int64_t r = 0; r < rows; ++r) {
            decode_columns(decoder, *call.plan, call.parts, row + r, start, stop, memory.weights + r * AMX_ROW_WORDS, memory.numbers.of(r));
        }
        memset(memory.weights + rows * AMX_ROW_WORDS, 0, (tiles_of(rows) * TILE - rows) * AMX_ROW_WORDS * sizeof(uint16_t));
    }

    inline void multiply(int64_t rows, int64_t start, int64_t stop, const AmxMemory& memory) const {
        const int64_t x_tile = spans * TURNS * TILE_WORDS, vectors = (stop - start) * TURNS, row_tiles = tiles_of(rows);
        const int64_t sums_apart = x_tiles() * TILE_FLOATS;
        for (int64_t m = 0; m < x_tiles(); m += 2) {
            const TileRows b = {x + m * x_tile + start * TURNS * TILE_WORDS, TILE_WORDS, x_tile, WORDS};
            for (int64_t r = 0; r < row_tiles; r += 2) {
                const TileRows a = {memory.weights + r * TILE * AMX_ROW_WORDS, WORDS, TILE * AMX_ROW_WORDS, AMX_ROW_WORDS};
                ADD_TILES[row_tiles - r > 1][x_tiles() - m > 1](
                    a, b, vectors, {memory.sums + r * sums_apart + m * TILE_FLOATS, sums_apart, TILE_FLOATS, TILE});
            }
        }
    }

    inline void write(int64_t row, int64_t rows, const AmxMemory& memory) const {
        for (int64_t m = 0; m < x_tiles(); ++m) {
            for (int64_t r = 0; r < tiles_of(rows); ++r) {
                const float* from = memory.sums + (r * x_tiles() + m) * TILE_FLOATS;
                Words square[TILE];
                for (int i = 0; i < TILE; ++i) square[i] = load_words(from + i * TILE);
                transpose(square);
                for (int i = 0; i < TILE; ++i) store_words(memory.products + i * AMX_ROWS + r * TILE, square[i]);
            }
            write_products(call, m * TILE, least(call.m, (m + 1) * TILE), row, rows, memory.products, AMX_ROWS);
        }
    }

    void rows(int64_t from, int64_t to, const AmxMemory& memory) const {
        const TileRegisters registers;
        with_rounding_decoder(*call.plan, [&](const auto& decoder) {
            for (int64_t row = from; row < to; row += AMX_ROWS) {
                const int64_t count = least(AMX_ROWS, to - row);
                memory.numbers.expand(call.parts, row, count);
                memset(memory.sums, 0, tiles_of(count) * x_tiles() * TILE_FLOATS * sizeof(float));
                for (int64_t start = 0; start < spans; start += AMX_SPANS) {
                    const int64_t stop = least(spans, start + AMX_SPANS);
                    this->decode(decoder, row, count, start, stop, memory);
                    multiply(count, start, stop, memory);
                }
                write(row, count, memory);
            }
        });
    }
};

inline bool amx_linear(const LinearCall& call) {
    const Plan& plan = *call.plan;
    if (call.m == 0 || plan.n == 0) return true;
    const int64_t spans = spans_of(plan.k), x_tiles = tiles_of(call.m), x_words = spans * TURNS * TILE_WORDS;
    const int threads = useful_threads(plan.n * spans * SPAN * call.m, call.threads);
    const int64_t row_floats = TILE * (spans * SPAN + WORDS) / 2, weight_floats = AMX_ROWS * AMX_ROW_WORDS / 2;
    const int64_t sums_floats = AMX_ROWS / TILE * x_tiles * TILE_FLOATS, product_floats = TILE * AMX_ROWS;
    const BlockNumbers numbers(plan, spans * SPAN, AMX_ROWS);
    const int64_t thread_floats =
        most(row_floats, weight_floats + sums_floats + product_floats + round_up(numbers.floats(), LANES));
    const Scratch words(x_tiles * x_words / 2), scratch(threads * thread_floats);
    if (words.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* x = reinterpret_cast<uint16_t*>(words.floats);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        uint16_t* rows = reinterpret_cast<uint16_t*>(scratch.floats + part * thread_floats);
        for (int64_t tile = x_tiles * part / threads; tile < x_tiles * (part + 1) / threads; ++tile) {
            arrange_tiles(call, tile, spans, rows, x + tile * x_words);
        }
    }

    const AmxLinear work{call, x, spans};
    const int64_t tiles = tiles_of(plan.n);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        float* own = scratch.floats + part * thread_floats;
        float* sums = own + weight_floats;
        float* products = sums + sums_floats;
        const AmxMemory memory = {reinterpret_cast<uint16_t*>(own), sums, products, numbers.in(products + product_floats)};
        work.rows(tiles * part / threads * TILE, least(plan.n, tiles * (part + 1) / threads * TILE), memory);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

// dX[M, K] = dY[M, N] W in bf16, in tile registers: the sum runs over rows of W. What two strips give for one column, 32 rows of W, is
// a row of a tile; dY lies in tiles whose lanes are its rows, made once per call. So products come out as columns of dX, and are turned
// over at the end. 256 columns by 512 rows of W lie in the second-level cache while every row of dY passes by, 32 of them in the first.
//
// Sums over one block of rows are added to fp32 sums in memory, in ascending order.
#pragma once

#include "amx_linear.h"

#ifdef QUANTLIB_HAS_TILES
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int PAIR_ROWS = 2 * STRIP;  // of W, that a tile adds up

// Stages STAGE and following of eight columns of two strips -> bf16 weights: 32 words for each column, in natural order.
template <Shift SHIFT, int STAGE = 0, class Numbers>
QUANTLIB_INLINE void round_columns(const Numbers& numbers, int bits, const typename Numbers::Raw (&raw)[2], const Floats (&scale)[2],
                                   const Floats (&shift)[2], uint16_t* to) {
    constexpr int WIDTH = TURNS / Numbers::STAGES;
    Floats low[2][WIDTH], high[2][WIDTH];
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) numbers.template stage<STAGE>(raw[s], low[s], high[s]);
#pragma GCC unroll 2
    for (int v = 0; v < WIDTH; ++v) {
        const int column = first_of_pair(bits, STAGE * WIDTH + v);
        const auto rounded = [&](const Floats (&number)[2][WIDTH]) QUANTLIB_LAMBDA {
            return round_words(scaled<SHIFT>(number[0][v], scale[0], shift[0]), scaled<SHIFT>(number[1][v], scale[1], shift[1]));
        };
        store_words(to + column * WORDS, rounded(low));
        store_words(to + (column + apart_in_pair(bits)) * WORDS, rounded(high));
    }
    if constexpr (STAGE + 1 < Numbers::STAGES) round_columns<SHIFT, STAGE + 1>(numbers, bits, raw, scale, shift, to);
}

struct AmxDgrad {
    const LinearCall& call;
    const uint16_t* dy;  // [tiles of its rows][pairs of strips] tiles
    int64_t pairs;
    const StripNumbers& numbers;

    // Floats that columns() works in.
    static int64_t floats(const LinearCall& call, const StripNumbers& numbers) {
        return AMX_WORDS / 2 + AMX_WIDTH * sums_stride(call) + 2 * (number_floats(numbers) + code_floats(call));
    }

    // Columns `from` ... `to`, the first a multiple of AMX_WIDTH.
    void columns(int64_t from, int64_t to, float* memory) const {
        const TileRegisters registers;
        uint16_t* const weights = reinterpret_cast<uint16_t*>(memory);
        float* const sums = memory + AMX_WORDS / 2;
        float* const placed = sums + AMX_WIDTH * sums_stride(call);
        with_strip_numbers(*call.plan, [&](const auto& codes, auto shifted) {
            for (int64_t column = from; column < to; column += AMX_WIDTH) {
                const int64_t width = least(AMX_WIDTH, to - column);
                if (pairs == 0) memset(sums, 0, AMX_WIDTH * sums_stride(call) * sizeof(float));
                for (int64_t first = 0; first < pairs; first += AMX_TILES) {
                    const int64_t count = least(AMX_TILES, pairs - first);
                    for (int64_t p = 0; p < count; ++p) {
                        this->template decode<decltype(shifted)::shift>(codes, (first + p) * PAIR_ROWS, column, width, placed,
                                                                        weights + p * TILE_WORDS);
                    }
                    multiply(tiles_of(width), first, count, weights, sums);
                }
                write(column, width, sums);
            }
        });
    }

  private:
    static int64_t sums_stride(const LinearCall& call) { return tiles_of(call.m) * TILE + LANES; }
    static int64_t number_floats(const StripNumbers& numbers) { return round_up(numbers.floats(), LANES); }
    static int64_t code_floats(const LinearCall& call) { return StripCodes::floats(*call.plan, AMX_WIDTH); }

    // Two strips, of which rows may be missing: zeros.
    template <Shift SHIFT, class Codes>
    inline void decode(const Codes& kept, int64_t row, int64_t column, int64_t width, float* placed, uint16_t* to) const {
        const Codes codes = kept;  // a local copy stays in registers
        const Plan& plan = *call.plan;
        const int64_t rows[2] = {row, row + STRIP < plan.n ? row + STRIP : row};
        StripNumbers::Memory of_strip[2] = {{numbers, placed}, {numbers, placed + number_floats(numbers)}};
        float* const read = placed + 2 * number_floats(numbers);
        const StripCodes strips[2] = {{call, read}, {call, read + code_floats(call)}};
        Planes planes[2];
        for (int s = 0; s < 2; ++s) {
            of_strip[s].begin(call.parts, rows[s], least(STRIP, plan.n - rows[s]));
            planes[s] = strips[s].planes(rows[s], column, column + width);
        }
        // What is decoded next: the same columns of the next two strips. Those of rows that are turned over were asked for then.
        const int64_t ahead = plan.strips ? PAIR_ROWS * row_bytes_of(plan) : 0, first = column / EIGHTH, last = (column + width) / EIGHTH;
        const auto round = [&](int64_t eighth, int64_t end, int64_t place) QUANTLIB_LAMBDA {
            Floats scale[2], shift[2];
            for (int s = 0; s < 2; ++s) {
                scale[s] = load(of_strip[s].scales() + place);
                shift[s] = SHIFT == Shift::none ? zero() : load(of_strip[s].shifts() + place);
            }
            for (; eighth < end; ++eighth) {
                const typename Codes::Raw raw[2] = {codes.raw_of_strip(planes[0], eighth, ahead), codes.raw_of_strip(planes[1], eighth, ahead)};
                const int64_t tile = (eighth - first) / 2, half = (eighth - first) % 2;
                round_columns<SHIFT>(codes, plan.bits, raw, scale, shift, to + tile * AMX_TILES * TILE_WORDS + half * (EIGHTH * WORDS));
            }
        };
        for_groups(numbers, planes, of_strip, first, last, ahead, round);
        const int64_t there = plan.n - row;
        for (int64_t c = 0; there < PAIR_ROWS && c < width; ++c) {
            uint16_t* words = to + c / TILE * AMX_TILES * TILE_WORDS + c % TILE * WORDS;
            memset(words + there, 0, (PAIR_ROWS - there) * sizeof(uint16_t));
        }
        if ((last - first) % 2 != 0) {
            memset(to + (last - first) / 2 * AMX_TILES * TILE_WORDS + EIGHTH * WORDS, 0, EIGHTH * WORDS * sizeof(uint16_t));
        }
    }

    // Tiles of columns times `count` pairs of strips from pair `first` on: sums[column][row of dY].
    inline void multiply(int64_t tiles, int64_t first, int64_t count, const uint16_t* weights, float* sums) const {
        const int64_t stride = sums_stride(call);
        for (int64_t m = 0; m < tiles_of(call.m); m += 2) {
            const TileRows b = {dy + (m * pairs + first) * TILE_WORDS, TILE_WORDS, pairs * TILE_WORDS, WORDS};
            for (int64_t t = 0; t < tiles; t += 2) {
                const TileRows a = {weights + t * AMX_TILES * TILE_WORDS, TILE_WORDS, AMX_TILES * TILE_WORDS, WORDS};
                const TileSums to = {sums + t * TILE * stride + m * TILE, TILE * stride, TILE, stride};
                multiply_pairs(first == 0, tiles - t, tiles_of(call.m) - m, a, b, count, to);
            }
        }
    }

    inline void write(int64_t column, int64_t width, const float* sums) const {
        const int64_t k = call.plan->k, stride = sums_stride(call);
        uint8_t* const dx = static_cast<uint8_t*>(call.y);
        for (int64_t m = 0; m < call.m; m += TILE) {
            for (int64_t c = 0; c < width && column + c < k; c += TILE) {
                Words square[TILE];
                for (int i = 0; i < TILE; ++i) square[i] = load_words(sums + (c + i) * stride + m);
                transpose(square);
                for (int64_t r = 0; r < least(TILE, call.m - m); ++r) {
                    float numbers[TILE];
                    store_words(numbers, square[r]);
                    const int64_t at = (m + r) * k + column + c;
                    write_numbers(call.dtype, numbers, least(TILE, k - column - c), dx + at * item_size(call.dtype));
                }
            }
        }
    }
};

// Rows TILE * tile ... of dY as tiles over `pairs` of strips: lane m of row p of a tile is the pair of words p of row m. `rows` is
// scratch for TILE rows.
inline void arrange_tiles(const LinearCall& call, int64_t tile, int64_t pairs, uint16_t* rows, uint16_t* to) {
    const int64_t width = pairs * PAIR_ROWS, count = least(TILE, call.m - tile * TILE), n = call.plan->n;
    for (int64_t r = 0; r < TILE; ++r) {
        uint16_t* row = rows + r * (width + WORDS);  // rows a multiple of 4096 bytes apart would compete for the same sets
        const int64_t there = r < count ? n : 0;
        const uint8_t* from = static_cast<const uint8_t*>(call.x) + (tile * TILE + r) * call.x_row_stride * 2;
        if (call.x_column_stride == 1) memcpy(row, from, there * 2);
        else for (int64_t i = 0; i < there; ++i) memcpy(row + i, from + i * call.x_column_stride * 2, 2);
        memset(row + there, 0, (width - there) * 2);
    }
    for (int64_t p = 0; p < pairs; ++p) {
        Words square[TILE];
        for (int r = 0; r < TILE; ++r) square[r] = load_words(rows + r * (width + WORDS) + p * WORDS);
        transpose(square);
        for (int i = 0; i < TILE; ++i) store_words(to + p * TILE_WORDS + i * WORDS, square[i]);
    }
}

// x of the call is dY [m, n], y is dX [m, k]; both bf16.
inline bool amx_dgrad(const LinearCall& call) {
    const Plan& plan = *call.plan;
    if (call.m == 0 || plan.k == 0) return true;
    const StripNumbers numbers(plan);
    const int64_t columns = eighths_of(plan) * EIGHTH, pairs = (plan.n + PAIR_ROWS - 1) / PAIR_ROWS, tiles = tiles_of(call.m);
    const int threads = useful_threads(plan.n * plan.padded_k * call.m, call.threads);
    const int64_t rows_floats = TILE * (pairs * PAIR_ROWS + WORDS) / 2;
    const int64_t thread_floats = round_up(most(rows_floats, AmxDgrad::floats(call, numbers)), LANES);
    const Scratch words(tiles * pairs * TILE_WORDS / 2), scratch(threads * thread_floats);
    if (words.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* const dy = reinterpret_cast<uint16_t*>(words.floats);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        uint16_t* const rows = reinterpret_cast<uint16_t*>(scratch.floats + part * thread_floats);
        for (int64_t tile = tiles * part / threads; tile < tiles * (part + 1) / threads; ++tile) {
            arrange_tiles(call, tile, pairs, rows, dy + tile * pairs * TILE_WORDS);
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        const AmxDgrad work{call, dy, pairs, numbers};
        work.columns(share_start(columns, AMX_WIDTH, part, threads), share_start(columns, AMX_WIDTH, part + 1, threads),
                     scratch.floats + part * thread_floats);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

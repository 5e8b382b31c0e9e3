// y[M, N] = x[M, K] W^T + bias in bf16 for many rows of x, in tile registers: codes of strips go through the law in fp32 and are rounded
// once to bf16 (strip_round.h), which leaves them in the order of tiles: pairs of columns of sixteen rows. 256 rows by 512 columns of W
// lie in the second-level cache while every row of x passes by, 32 rows of x in the first.
//
// Sums over one block of columns are added to fp32 sums in memory, in ascending order, so that a row of y depends neither on threads nor
// on the other rows of x.
#pragma once

#include "simd_amx.h"
#include "strip_round.h"

#ifdef QUANTLIB_HAS_TILES
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int TILE_EIGHTHS = TILE / TURNS;  // times eight columns in a tile
// Tiles over which a block is summed, and those of W across it: two by two rows of tiles of the other factor are 32 KB.
constexpr int AMX_TILES = 16;
constexpr int64_t AMX_EIGHTHS = AMX_TILES * TILE_EIGHTHS, AMX_WIDTH = AMX_TILES * TILE;
constexpr int64_t AMX_WORDS = AMX_TILES * AMX_TILES * TILE_WORDS;
// Rows of sums a multiple of 4096 bytes apart would all compete for the same few sets of the first-level cache.
constexpr int64_t AMX_STRIDE = AMX_WIDTH + LANES;

// Which words of 32 natural ones are pairs, in the order in which codes leave their places.
inline Words pair_order(int bits) {
    uint16_t order[WORDS];
    for (int p = 0; p < TILE; ++p) {
        const int place = p / TURNS * EIGHTH + first_of_pair(bits, p % TURNS);
        order[2 * p] = uint16_t(place), order[2 * p + 1] = uint16_t(place + apart_in_pair(bits));
    }
    return load_words(order);
}
// Row m of x as it comes, zeros behind column k: whole spans for so many eighths.
inline void read_row(const LinearCall& call, int64_t m, int64_t eighths, uint16_t* natural) {
    for (int64_t span = 0; span * (SPAN / EIGHTH) < eighths; ++span) {
        read_span(call, m, span, 1, reinterpret_cast<uint16_t(*)[SPAN]>(natural + span * SPAN));
    }
}

struct AmxLinear {
    const LinearCall& call;
    const uint16_t* x;  // [tiles of rows][tiles of columns] tiles
    int64_t x_tiles, eighths;
    const StripNumbers& numbers;

    // Floats that rows() works in.
    static int64_t floats(const LinearCall& call, const StripNumbers& numbers) {
        return AMX_WORDS / 2 + tiles_of(call.m) * TILE * AMX_STRIDE + round_up(numbers.floats(), LANES) +
               StripCodes::floats(*call.plan, AMX_EIGHTHS * EIGHTH);
    }

    void rows(int64_t start, int64_t stop, float* memory) const {
        const TileRegisters registers;
        uint16_t* const weights = reinterpret_cast<uint16_t*>(memory);
        float* const sums = memory + AMX_WORDS / 2;
        float* const placed = sums + tiles_of(call.m) * TILE * AMX_STRIDE;
        const StripCodes strips(call, placed + round_up(numbers.floats(), LANES));
        with_strip_numbers(*call.plan, [&](const auto& codes, auto shifted) {
            for (int64_t row = start; row < stop; row += AMX_WIDTH) {
                const int64_t rows = least(AMX_WIDTH, stop - row);
                if (eighths == 0) memset(sums, 0, tiles_of(call.m) * TILE * AMX_STRIDE * sizeof(float));
                for (int64_t first = 0; first < eighths; first += AMX_EIGHTHS) {
                    const int64_t last = least(eighths, first + AMX_EIGHTHS);
                    for (int64_t s = 0; s < tiles_of(rows); ++s) {
                        this->template decode<decltype(shifted)::shift>(codes, row + s * STRIP, first, last, strips, placed,
                                                                        weights + s * AMX_TILES * TILE_WORDS);
                    }
                    multiply(tiles_of(rows), first / TILE_EIGHTHS, (last - first + TILE_EIGHTHS - 1) / TILE_EIGHTHS, weights, sums);
                }
                write_products(call, row, rows, sums, AMX_STRIDE);
            }
        });
    }

  private:
    template <Shift SHIFT, class Codes>
    inline void decode(const Codes& codes, int64_t row, int64_t first, int64_t last, const StripCodes& strips, float* placed,
                       uint16_t* to) const {
        const Planes planes[1] = {strips.planes(row, first * EIGHTH, last * EIGHTH)};
        StripNumbers::Memory of_strip[1] = {{numbers, placed}};
        of_strip[0].begin(call.parts, row, least(STRIP, call.plan->n - row));
        // What is decoded next: the same columns of the next strip. Those of rows that are turned over were asked for then.
        const int64_t ahead = call.plan->strips ? STRIP * row_bytes_of(*call.plan) : 0;
        round_strip<SHIFT, WORDS>(codes, numbers, planes, of_strip, first, last, ahead, to);
        const int64_t vectors = (last - first) * TURNS;
        memset(to + vectors * WORDS, 0, (round_up(vectors, TILE) - vectors) * WORDS * sizeof(uint16_t));
    }

    // `count` tiles of columns from tile `first` on.
    inline void multiply(int64_t strips, int64_t first, int64_t count, const uint16_t* weights, float* sums) const {
        for (int64_t m = 0; m < tiles_of(call.m); m += 2) {
            const TileRows a = {x + (m * x_tiles + first) * TILE_WORDS, TILE_WORDS, x_tiles * TILE_WORDS, WORDS};
            for (int64_t s = 0; s < strips; s += 2) {
                const TileRows b = {weights + s * AMX_TILES * TILE_WORDS, TILE_WORDS, AMX_TILES * TILE_WORDS, WORDS};
                const TileSums to = {sums + m * TILE * AMX_STRIDE + s * TILE, TILE * AMX_STRIDE, TILE, AMX_STRIDE};
                multiply_pairs(first == 0, tiles_of(call.m) - m, strips - s, a, b, count, to);
            }
        }
    }
};

inline bool amx_linear(const LinearCall& call) {
    const Plan& plan = *call.plan;
    if (call.m == 0 || plan.n == 0) return true;
    const StripNumbers numbers(plan);
    const int64_t eighths = eighths_of(plan), x_tiles = (eighths + TILE_EIGHTHS - 1) / TILE_EIGHTHS;
    const int threads = useful_threads(plan.n * plan.padded_k * call.m, call.threads);
    const int64_t natural_floats = round_up(eighths * EIGHTH, SPAN) / 2;
    const int64_t thread_floats = round_up(most(natural_floats, AmxLinear::floats(call, numbers)), LANES);
    const Scratch words(tiles_of(call.m) * x_tiles * TILE_WORDS / 2), scratch(threads * thread_floats);
    if (words.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* const x = reinterpret_cast<uint16_t*>(words.floats);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        uint16_t* const natural = reinterpret_cast<uint16_t*>(scratch.floats + part * thread_floats);
        const Words order = pair_order(plan.bits);
        const int64_t rows = tiles_of(call.m) * TILE;
        for (int64_t m = share_start(rows, 1, part, threads); m < share_start(rows, 1, part + 1, threads); ++m) {
            if (m < call.m) read_row(call, m, eighths, natural);
            else memset(natural, 0, natural_floats * sizeof(float));
            uint16_t* to = x + (m / TILE * x_tiles * TILE + m % TILE) * WORDS;
            for (int64_t t = 0; t < x_tiles; ++t, to += TILE_WORDS) {
                store_words(to, _mm512_permutexvar_epi16(order, load_words(natural + t * WORDS)));
            }
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        const AmxLinear work{call, x, x_tiles, eighths, numbers};
        work.rows(share_start(plan.n, STRIP, part, threads), share_start(plan.n, STRIP, part + 1, threads),
                  scratch.floats + part * thread_floats);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

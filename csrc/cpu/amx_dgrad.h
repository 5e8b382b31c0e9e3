// dX[M, K] = dY[M, N] W in bf16, in tile registers: rows of W are decoded and interleaved in pairs as pairs_dgrad.h does it, and 32
// rows of dY are multiplied by 32 columns at a time. Lane c of row p of a tile of W is the pair p of rows in one column; dY lies
// in tiles, made once per call.
#pragma once

#include "pairs_dgrad.h"
#include "simd_amx.h"

#ifdef QUANTLIB_HAS_TILES
namespace quantlib::cpu::QUANTLIB_ISA {

struct MultiplyInTiles {
    using Block = DgradBlock<512, 4>;  // with the sums of 512 rows of dY it fills the second-level cache of 2 MB
    static constexpr int WHOLE_ROWS = TILE, WHOLE_PAIRS = TILE;
    static int64_t place(int64_t m, int64_t n, int64_t dy_stride) {
        return m / TILE * TILE * dy_stride + n * TILE + m % TILE * WORDS;
    }

    const LinearCall& call;
    const uint16_t* dy;
    int64_t dy_stride;

    void operator()(int64_t row, int64_t pairs, int64_t spans, const DgradMemory& memory) const {
        const TileRegisters registers;
        const int64_t row_tiles = tiles_of(call.m);
        for (int64_t half = 0; half < 2 * spans; ++half) {
            for (int64_t m = 0; m < row_tiles; m += 2) {
                const TileRows a = {dy + place(m * TILE, row, dy_stride), TILE_WORDS, TILE * dy_stride, WORDS};
                for (int v = 0; v < DGRAD_VECTORS; v += 2) {
                    const uint16_t* words = memory.weights + half * Block::HALF_WORDS + v * WORDS;
                    float* sums = memory.sums + m * TILE * Block::STRIDE + half * (SPAN / 2) + v * LANES;
                    ADD_TILES[row_tiles - m > 1][1](a, {words, TILE * PAIR_WORDS, WORDS, PAIR_WORDS}, pairs / TILE,
                                                    {sums, TILE * Block::STRIDE, LANES, Block::STRIDE});
                }
            }
        }
    }
};

inline bool amx_dgrad(const LinearCall& call) { return dgrad<MultiplyInTiles>(call); }

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

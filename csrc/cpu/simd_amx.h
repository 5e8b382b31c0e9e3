// Tile registers: what AMX adds to simd_pairs.h. Eight registers of 16 rows of 64 bytes; only the instruction set that has them
// includes this file.
//
// A product adds to sum[r][c] what 16 pairs of bf16 numbers make, a row r of one tile times a column c of pairs of the other; inputs
// and sums below 2^-126 count as zero there.
#pragma once

#include "simd_pairs.h"

#if QUANTLIB_ISA_LEVEL >= 4
#define QUANTLIB_HAS_TILES

namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int TILE = 16;                         // rows of a tile, fp32 sums or pairs of bf16 numbers in one of them
constexpr int64_t TILE_WORDS = TILE * WORDS;     // bf16 numbers of a tile
constexpr int64_t TILE_FLOATS = TILE * TILE;

inline int64_t tiles_of(int64_t rows) { return (rows + TILE - 1) / TILE; }

// gcc's intrinsics (12 and 13) don't say that they read the memory behind an address: what was stored there must have been.
QUANTLIB_INLINE void written(const void* address) { asm volatile("" : : "r"(address) : "memory"); }

// All eight registers, until the end of the scope: 0 to 3 for sums, 4 and 5 for what is multiplied by 6 and 7, which are whole. The
// former have so many rows. Each thread has its own.
class TileRegisters {
  public:
    explicit TileRegisters(int rows = TILE) {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        static_assert(sizeof(shape) == 64);
        for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = uint8_t(i < 6 ? rows : TILE);
        written(&shape);
        _tile_loadconfig(&shape);
    }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

// All four registers of sums, stored as whole tiles one behind the other.
QUANTLIB_INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
QUANTLIB_INLINE void store_sums(float* to) {
    _tile_stored(0, to, TILE * 4);
    _tile_stored(1, to + TILE_FLOATS, TILE * 4);
    _tile_stored(2, to + 2 * TILE_FLOATS, TILE * 4);
    _tile_stored(3, to + 3 * TILE_FLOATS, TILE * 4);
}
// Add to sums [a][b] the products of one or two tiles of a and of b: words to the second, bytes from row to row. Registers are numbers that
// the compiler must see: sums 0-3, a 4-5, b 6-7.
template <int AS, int BS>
QUANTLIB_INLINE void add_products(const uint16_t* a, int64_t second_a, int64_t row_a, const uint16_t* b, int64_t second_b, int64_t row_b) {
    _tile_loadd(4, a, row_a);
    _tile_loadd(6, b, row_b);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (BS == 2) {
        _tile_loadd(7, b + second_b, row_b);
        _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (AS == 2) {
        _tile_loadd(5, a + second_a, row_a);
        _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (AS == 2 && BS == 2) _tile_dpbf16ps(3, 5, 7);
}
// The products of one tile and of four that lie one behind the other.
QUANTLIB_INLINE void add_row_of_products(const uint16_t* a, const uint16_t* b) {
    add_products<1, 2>(a, 0, WORDS * 2, b, TILE_WORDS, WORDS * 2);
    _tile_loadd(6, b + 2 * TILE_WORDS, WORDS * 2);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, b + 3 * TILE_WORDS, WORDS * 2);
    _tile_dpbf16ps(3, 4, 7);
}

// Where the tiles of a factor lie, in words: from one to the next that it is summed over, to the second that is multiplied beside
// the first, and from row to row.
struct TileRows {
    const uint16_t* words;
    int64_t next, second, row;
};

// sums[i][j] += a[i] times b[j], or = where they are NEW, over `count` tiles each, for one or two tiles i of a and j of b.
struct TileSums {
    float* floats;
    int64_t apart_in_a, apart_in_b, row;  // in floats: to the tile of the second of a, of the second of b, from row to row
};

template <bool NEW, int AS, int BS>
void multiply_tiles(const TileRows& a, const TileRows& b, int64_t count, const TileSums& to) {
    const int64_t a_row = a.row * 2, b_row = b.row * 2, sums_row = to.row * 4;
    float *const sums = to.floats, *const right = sums + to.apart_in_b;
    float *const lower = sums + to.apart_in_a, *const last = lower + to.apart_in_b;
    const uint16_t *from_a = a.words, *from_b = b.words;
    written(from_a);
    if constexpr (NEW) {
        _tile_zero(0);
        if constexpr (BS == 2) _tile_zero(1);
        if constexpr (AS == 2) _tile_zero(2);
        if constexpr (AS == 2 && BS == 2) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, sums_row);
        if constexpr (BS == 2) _tile_loadd(1, right, sums_row);
        if constexpr (AS == 2) _tile_loadd(2, lower, sums_row);
        if constexpr (AS == 2 && BS == 2) _tile_loadd(3, last, sums_row);
    }
    for (int64_t i = 0; i < count; ++i, from_a += a.next, from_b += b.next) {
        add_products<AS, BS>(from_a, a.second, a_row, from_b, b.second, b_row);
    }
    _tile_stored(0, sums, sums_row);
    if constexpr (BS == 2) _tile_stored(1, right, sums_row);
    if constexpr (AS == 2) _tile_stored(2, lower, sums_row);
    if constexpr (AS == 2 && BS == 2) _tile_stored(3, last, sums_row);
}

// The same for as many of a and of b as there are, up to two; NEW at run time.
inline void multiply_pairs(bool begins, int64_t in_a, int64_t in_b, const TileRows& a, const TileRows& b, int64_t count, const TileSums& to) {
    using Multiply = void (*)(const TileRows&, const TileRows&, int64_t, const TileSums&);
    static constexpr Multiply ALL[2][2][2] = {{{multiply_tiles<false, 1, 1>, multiply_tiles<false, 1, 2>},
                                               {multiply_tiles<false, 2, 1>, multiply_tiles<false, 2, 2>}},
                                              {{multiply_tiles<true, 1, 1>, multiply_tiles<true, 1, 2>},
                                               {multiply_tiles<true, 2, 1>, multiply_tiles<true, 2, 2>}}};
    ALL[begins][in_a > 1][in_b > 1](a, b, count, to);
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

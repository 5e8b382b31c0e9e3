// A row of few rows of x as tile registers multiply it by strips (amx_strip.h): cut into tiles at the ends of groups of columns that share
// a scale.
#pragma once

#include "amx_linear.h"

#ifdef QUANTLIB_HAS_TILES
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int X_TILES = 2;  // beside each other

// Up to TILE_EIGHTHS times eight columns of a row, of one group or of several whole ones.
struct StripTile {
    int32_t eighth, eighths;  // the first, and how many
    int32_t group;            // the first
    bool begins, ends;        // registers of sums: zeros before it, stored after it
    int64_t words, own;       // of x: what is multiplied, and where its own lanes are
};

// How the columns of a row are cut: every 32 columns of a group, and at its end.
struct StripTiles {
    int64_t width, eighths;  // of a group and of a row, times eight columns
    int together;            // groups in one tile
    int64_t count;

    StripTiles(int64_t width, int64_t eighths)
        : width(width), eighths(eighths), together(width == 1 || width == 2 ? TILE_EIGHTHS / int(width) : 1),
          count(together > 1 ? of_columns(eighths) : eighths / width * of_columns(width) + of_columns(eighths % width)) {}
    // Rows of x that one tile has lanes for.
    int rows() const { return TILE / together; }

  private:
    static int64_t of_columns(int64_t eighths) { return (eighths + TILE_EIGHTHS - 1) / TILE_EIGHTHS; }
};

// Whether every code stands for a number, so that times zero it is zero.
inline bool finite(const Plan& plan) {
    const Words exponent = same_words(0x7F80);
    bool all = true;
    for (int first = 0; first < 1 << plan.bits; first += WORDS) {
        const __mmask32 there = __mmask32((uint64_t(1) << least(WORDS, (1 << plan.bits) - first)) - 1);
        const Words values = _mm512_and_si512(_mm512_maskz_loadu_epi16(there, plan.pairs + first), exponent);
        all = all && _mm512_cmpeq_epi16_mask(values, exponent) == 0;
    }
    return all;
}

// Up to X_TILES tiles of x beside each other: [tile][beside][lane][32 words], a lane is (group of the tile, row of x). Where every tile
// ends its groups and lanes are few, sums of two tiles are stacked in one register, and x is [pair of tiles][3][lane][32 words]: lanes of
// the first tile, zeros, lanes of the second. The first tile is multiplied by the former two, the second by the latter two.
struct AmxStripX {
    const uint16_t* words = nullptr;
    const float* sums = nullptr;  // [group][row], over each group; null where no format needs them
    const StripTile* tiles = nullptr;
    const int64_t first;        // row of x
    const int count;            // of rows
    const int rows, beside;     // in one tile, tiles
    const bool stacked;
    const int groups;           // whose sums are in one register
    const int64_t lanes_words;  // of a tile

    AmxStripX(const StripTiles& tiles, bool finite, int64_t m, int64_t first)
        : first(first), count(int(least(X_TILES * tiles.rows(), m - first))), rows(int(least(tiles.rows(), count))),
          beside(count > tiles.rows() ? X_TILES : 1),
          stacked(finite && tiles.width <= TILE_EIGHTHS && 2 * rows * tiles.together <= TILE),
          groups(stacked ? 2 * tiles.together : tiles.together), lanes_words(rows * tiles.together * WORDS) {}

    int64_t words_in_all(const StripTiles& all) const { return lanes_words * (stacked ? (all.count + 1) / 2 * 3 : all.count * beside); }
    int64_t sums_in_all(int64_t groups_across) const { return round_up(groups_across, groups) * count; }

    // The tiles of a row, and one of no columns behind them.
    void cut(const StripTiles& all, StripTile* to) const {
        int64_t eighth = 0, group = 0, words = 0;
        bool begins = true;
        for (int64_t t = 0; t < all.count; ++t) {
            const bool second = stacked && t % 2 == 1, last = t + 1 == all.count;
            const int64_t end = all.together > 1 ? all.eighths : least((group + 1) * all.width, all.eighths);
            const int64_t eighths = least(TILE_EIGHTHS, end - eighth);
            const bool ended = all.together > 1 || eighth + eighths == end;
            to[t] = {int32_t(eighth), int32_t(eighths), int32_t(group), begins && !second, ended && (!stacked || second || last), words,
                     second ? words + lanes_words : words};
            words += lanes_words * (stacked ? 1 + second : beside);
            eighth += eighths, group += ended ? all.together : 0, begins = ended;
        }
        to[all.count] = {int32_t(eighth), 0, int32_t(group), false, false, words, words};
    }
};

// Row `row` of those of `x` -> its lane of every tile, and its sums.
inline void scatter_strip_row(const LinearCall& call, const StripTiles& all, const AmxStripX& x, int row, uint16_t* natural, uint16_t* to,
                              float* sums) {
    read_row(call, x.first + row, all.eighths, natural);
    const Words index = pair_order(call.plan->bits);
    const int width = WORDS / all.together;
    int64_t group = 0;
    float sum = 0.0f;
    to += row / x.rows * x.lanes_words + row % x.rows * WORDS;
    for (int64_t t = 0; t < all.count; ++t) {
        const StripTile tile = x.tiles[t];
        const bool ended = x.tiles[t + 1].group != tile.group;
        const __mmask32 there = __mmask32((uint64_t(1) << tile.eighths * EIGHTH) - 1);
        const Words words = _mm512_permutexvar_epi16(index, _mm512_maskz_loadu_epi16(there, natural + tile.eighth * EIGHTH));
        for (int g = 0; g < all.together; ++g) {
            const __mmask32 own = __mmask32(((uint64_t(1) << width) - 1) << g * width);
            const Words kept = _mm512_maskz_mov_epi16(own, words);
            const int64_t lane = g * x.rows * WORDS, zeros = tile.own > tile.words ? tile.words : tile.words + x.lanes_words;
            store_words(to + tile.own + lane, kept);
            if (x.stacked) store_words(to + zeros + lane, _mm512_setzero_si512());
            if (sums == nullptr) continue;
            sum += _mm512_reduce_add_ps(dot(zero(), same_words(0x3F80), kept));
            if (!ended) continue;
            sums[group++ * x.count + row] = sum;
            sum = 0.0f;
        }
    }
    for (; sums != nullptr && group % x.groups != 0; ++group) sums[group * x.count + row] = 0.0f;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

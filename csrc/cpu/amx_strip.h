// y[M, N] = x[M, K] W^T + bias in bf16 for few rows of x, in tile registers, W in strips of sixteen rows (strips.h): what a strip's codes
// come out as, pairs of columns of sixteen rows, are the rows of a tile. Codes become exact bf16 numbers in the first-level cache while
// the tile registers multiply what was decoded before; scales and zeros are applied to the fp32 sums of a block of columns, minima to
// those of x over it.
//
// A product of tiles adds up 32 columns. Where a block is narrower, lanes of x are pairs (block, row of x) whose columns of other blocks
// are zero, so that a code whose number is infinite makes NaN of them. A row of y depends neither on the number of threads nor on the
// other rows of x.
#pragma once

#include "amx_linear.h"

#ifdef QUANTLIB_HAS_TILES
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int X_TILES = 2;  // beside each other
// Tiles of a strip that are scaled together, at most. They are multiplied while the next ones are decoded: what was stored must have
// reached the cache, a tile waits for it.
constexpr int MOST_TILES = 4;

// How the columns of a row are cut into tiles: every 32 columns of a group that shares a scale, and at its end.
struct StripTiles {
    int64_t group, eighths;  // of a group and of a row, times eight columns
    int together;            // groups in one tile

    StripTiles(int64_t group, int64_t eighths)
        : group(group), eighths(eighths), together(group == 1 || group == 2 ? TILE_EIGHTHS / int(group) : 1) {}
    // Rows of x that one tile has lanes for.
    int rows() const { return TILE / together; }
    int64_t count() const {
        if (together > 1) return of_columns(eighths);
        return eighths / group * of_columns(group) + of_columns(eighths % group);
    }

    struct Place {
        int64_t eighth = 0, group = 0;  // the first of a tile
        bool begins = true;             // its group
    };
    int64_t in_tile(const Place& at) const {
        const int64_t rest = eighths - at.eighth;
        return least(least(TILE_EIGHTHS, rest), together > 1 ? rest : (at.group + 1) * group - at.eighth);
    }
    // Go on to the next tile; returns whether a group ended.
    QUANTLIB_INLINE bool pass(Place& at) const {
        at.eighth += in_tile(at);
        at.begins = together > 1 || at.eighth == (at.group + 1) * group || at.eighth == eighths;
        if (at.begins) at.group += together;
        return at.begins;
    }

  private:
    static int64_t of_columns(int64_t eighths) { return (eighths + TILE_EIGHTHS - 1) / TILE_EIGHTHS; }
};

// Up to X_TILES tiles of x beside each other: [tile][beside][lane][32 words], a lane is (group of the tile, row of x).
struct AmxStripX {
    const uint16_t* words;
    const float* sums;  // [group][row], over each group; null where no format needs them
    int64_t first;      // row of x
    int count;          // of rows
    int rows, beside;   // in one tile, tiles

    AmxStripX(const StripTiles& tiles, int64_t m, int64_t first)
        : words(nullptr), sums(nullptr), first(first), count(int(least(X_TILES * tiles.rows(), m - first))),
          rows(int(least(tiles.rows(), count))), beside(count > tiles.rows() ? X_TILES : 1) {}
    int64_t tile_words(const StripTiles& tiles) const { return rows * tiles.together * WORDS; }
    // Tiles of a strip that are scaled together: weights, sums and scales share the first-level cache.
    int64_t unit(const StripTiles& tiles) const { return rows * tiles.together * beside <= TILE / 2 ? MOST_TILES : MOST_TILES / 2; }
    int64_t words_in_all(const StripTiles& tiles) const { return tiles.count() * beside * tile_words(tiles); }
    int64_t sums_in_all(const StripTiles& tiles, int64_t groups) const { return round_up(groups, tiles.together) * count; }
};

// Row `row` of those of `x` -> its lane of every tile, and its sums.
inline void scatter_strip_row(const LinearCall& call, const StripTiles& tiles, const AmxStripX& x, int row, uint16_t* natural, uint16_t* to,
                              float* sums) {
    read_row(call, x.first + row, tiles.eighths, natural);
    const Words index = pair_order(call.plan->bits);
    const int width = WORDS / tiles.together;
    float sum = 0.0f;
    to += (row / x.rows) * x.tile_words(tiles) + row % x.rows * WORDS;
    for (StripTiles::Place at; at.eighth < tiles.eighths; to += x.beside * x.tile_words(tiles)) {
        const __mmask32 there = __mmask32((uint64_t(1) << tiles.in_tile(at) * EIGHTH) - 1);
        const Words words = _mm512_permutexvar_epi16(index, _mm512_maskz_loadu_epi16(there, natural + at.eighth * EIGHTH));
        const int64_t group = at.group;
        const bool ended = tiles.pass(at);
        for (int g = 0; g < tiles.together; ++g) {
            const __mmask32 own = __mmask32(((uint64_t(1) << width) - 1) << g * width);
            const Words kept = _mm512_maskz_mov_epi16(own, words);
            store_words(to + g * x.rows * WORDS, kept);
            if (sums == nullptr) continue;
            sum += _mm512_reduce_add_ps(dot(zero(), same_words(0x3F80), kept));
            if (!ended) continue;
            sums[(group + g) * x.count + row] = sum;
            sum = 0.0f;
        }
    }
}

// What one thread works in, for STRIPS strips.
struct AmxStripMemory {
    uint16_t* weights;  // [2][unit][strip] tiles
    float* sums;        // [2][unit][beside][strip] tiles, as many rows of each as there are lanes
    float* totals;      // [strip][row of x][STRIP]
    float* numbers;

    static constexpr int64_t WEIGHT_FLOATS = 2 * MOST_TILES * STRIPS * TILE_WORDS / 2, SUM_FLOATS = 2 * MOST_TILES * X_TILES * STRIPS * TILE_FLOATS;
    static constexpr int64_t TOTAL_FLOATS = STRIPS * X_TILES * TILE * STRIP;
    static int64_t size(const StripNumbers& numbers) {
        return WEIGHT_FLOATS + SUM_FLOATS + TOTAL_FLOATS + STRIPS * round_up(numbers.floats(), LANES);
    }
    explicit AmxStripMemory(float* memory)
        : weights(reinterpret_cast<uint16_t*>(memory)), sums(memory + WEIGHT_FLOATS), totals(sums + SUM_FLOATS), numbers(totals + TOTAL_FLOATS) {}
};

struct AmxStrip {
    const LinearCall& call;
    const StripTiles& tiles;
    const AmxStripX& x;
    const StripNumbers& numbers;

    void rows(int64_t start, int64_t stop, const AmxStripMemory& memory, float* whole_memory) const {
        with_codes(*call.plan, [&](const auto& codes) { this->all_rows(codes, start, stop, memory, whole_memory); });
    }

  private:
    // Two streams of strips, half of the range apart: memory delivers several faster than one.
    template <class Codes>
    void all_rows(const Codes& codes, int64_t start, int64_t stop, const AmxStripMemory& memory, float* whole_memory) const {
        const TileRegisters registers(x.rows * tiles.together);
        const Plan& plan = *call.plan;
        const int64_t number_floats = round_up(numbers.floats(), LANES);
        StripNumbers::Memory of_strip[STRIPS] = {{numbers, memory.numbers}, {numbers, memory.numbers + number_floats}};
        const WholeStrip whole(call, whole_memory);
        const int64_t strips = (stop - start + STRIP - 1) / STRIP, half = (strips + 1) / 2;
        for (int64_t i = 0; i < half; ++i) {
            const int64_t row[STRIPS] = {start + i * STRIP, start + least(half + i, strips - 1) * STRIP};
            Planes strip[STRIPS];
            for (int s = 0; s < STRIPS; ++s) {
                of_strip[s].begin(call.parts, row[s], least(STRIP, plan.n - row[s]));
                strip[s] = whole.planes(row[s]);
            }
            for (int64_t j = 0; j < STRIPS * x.count; ++j) store(memory.totals + j * STRIP, zero());
            multiply(codes, strip, of_strip, memory);
            for (int s = 0; s < STRIPS; ++s) {
                write_products(call, x.first, x.first + x.count, row[s], least(STRIP, plan.n - row[s]),
                               memory.totals + s * x.count * STRIP, STRIP);
            }
        }
    }

    // totals = the strips times x.
    template <class Codes>
    __attribute__((noinline)) void multiply(const Codes& kept, const Planes (&strip)[STRIPS], StripNumbers::Memory (&of_strip)[STRIPS],
                                            const AmxStripMemory& memory) const {
        const Codes codes = kept;  // a local copy stays in registers
        const StripTiles tiles = this->tiles;
        const int64_t count = tiles.count(), x_words = x.beside * x.tile_words(tiles), unit = x.unit(tiles);
        StripTiles::Place decoded, multiplied;
        const uint16_t* of_x = x.words;
        Made before = {0, 0, 0}, made = {0, 0, 0};
        for (int64_t u = 0; u < (count + unit - 1) / unit + 1; ++u) {
            uint16_t* const to = memory.weights + u % 2 * (unit * STRIPS * TILE_WORDS);
            const uint16_t* from = memory.weights + (u + 1) % 2 * (unit * STRIPS * TILE_WORDS);
            made = {u % 2 * unit, multiplied.group, 0};
            for (int64_t i = 0; i < unit; ++i) {
                if (decoded.eighth < tiles.eighths) {
                    const int64_t eighths = tiles.in_tile(decoded);
                    for (int s = 0; s < STRIPS; ++s) decode(codes, strip[s], decoded.eighth, eighths, to + (i * STRIPS + s) * TILE_WORDS);
                    tiles.pass(decoded);
                }
                if (u > 0 && multiplied.eighth < tiles.eighths) {
                    const bool begins = multiplied.begins, ends = tiles.pass(multiplied);
                    multiply_tile(from + i * STRIPS * TILE_WORDS, of_x, begins, ends ? memory.sums + made.at(x.beside) : nullptr);
                    of_x += x_words;
                    made.count += ends;
                }
            }
            settle(before, of_strip, strip, decoded.eighth, memory);
            before = made;
        }
        settle(before, of_strip, strip, decoded.eighth, memory);
    }

    // Sums that one unit has left: of tiles.together groups each.
    struct Made {
        int64_t first, group, count;
        int64_t at(int beside) const { return (first + count) * beside * STRIPS * TILE_FLOATS; }
    };

    // One tile of a strip, whose last columns may be missing.
    template <class Codes>
    QUANTLIB_INLINE void decode(const Codes& codes, const Planes& strip, int64_t eighth, int64_t eighths, uint16_t* to) const {
#pragma GCC unroll 4
        for (int e = 0; e < TILE_EIGHTHS; ++e, to += TURNS * WORDS) {
            Words w[TURNS];
            if (e < eighths) look_up_stages(codes, codes.raw_of_strip(strip, eighth + e, STRIP_AHEAD), w);
            else for (int v = 0; v < TURNS; ++v) w[v] = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int v = 0; v < TURNS; ++v) store_words(to + v * WORDS, w[v]);
        }
    }

    // Registers 0 to 3, [beside][strip], = or += a tile of x times those of the strips; to `sums` where there are any.
    QUANTLIB_INLINE void multiply_tile(const uint16_t* weights, const uint16_t* of_x, bool begins, float* sums) const {
        written(weights);
        if (begins) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        _tile_loadd(4, of_x, WORDS * 2);
        _tile_loadd(6, weights, WORDS * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + TILE_WORDS, WORDS * 2);
        _tile_dpbf16ps(1, 4, 7);
        if (x.beside == 2) {
            _tile_loadd(5, of_x + x.tile_words(tiles), WORDS * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (sums == nullptr) return;
        _tile_stored(0, sums, STRIP * 4);
        _tile_stored(1, sums + TILE_FLOATS, STRIP * 4);
        if (x.beside == 2) {
            _tile_stored(2, sums + 2 * TILE_FLOATS, STRIP * 4);
            _tile_stored(3, sums + 3 * TILE_FLOATS, STRIP * 4);
        }
    }

    // totals += what a unit has left, under its scales. `eighth`: what will be decoded next.
    inline void settle(const Made& made, StripNumbers::Memory (&of_strip)[STRIPS], const Planes (&strip)[STRIPS], int64_t eighth,
                       const AmxStripMemory& memory) const {
        for (int64_t i = 0; i < made.count;) {
            const int64_t group = made.group + i * tiles.together, place = group & (numbers.groups() - 1);
            const int64_t count = least(made.count - i, (numbers.groups() - place) / tiles.together);
            for (int s = 0; s < STRIPS; ++s) {
                if (place == 0) {
                    of_strip[s].fill(group, least(numbers.groups(), numbers.groups_across() - group), tiles.together,
                                     strip[s].plane[0] + line_of(*call.plan, eighth) + STRIP_AHEAD);
                }
                const float* sums = memory.sums + Made{made.first, group, i}.at(x.beside) + s * TILE_FLOATS;
                for (int b = 0; b < x.beside; ++b, sums += STRIPS * TILE_FLOATS) {
                    const int first = b * x.rows;
                    const Settled settled = {of_strip[s].scales() + place * STRIP, of_strip[s].shifts() + place * STRIP,
                                             x.sums + group * x.count + first, x.count, sums, x.beside * STRIPS * TILE_FLOATS,
                                             x.rows * STRIP, count, tiles.together};
                    settle_rows(settled, int(least(x.rows, x.count - first)), memory.totals + (s * x.count + first) * STRIP);
                }
            }
            i += count;
        }
    }

    // Sums of one strip, [count][together][row of x], and what they are scaled by.
    struct Settled {
        const float *scales, *shifts;  // of the first group
        const float* of_x;             // sums of x over the first group; from one group to the next:
        int64_t of_x_stride;
        const float* sums;
        int64_t sums_stride, group_stride, count;
        int together;
    };
    inline void settle_rows(const Settled& of, int rows, float* totals) const {
        switch (shift_of(*call.plan)) {
            case Shift::none: return settle_all<Shift::none>(of, rows, totals);
            case Shift::zero: return settle_all<Shift::zero>(of, rows, totals);
            case Shift::minimum: return settle_all<Shift::minimum>(of, rows, totals);
        }
    }
    template <Shift SHIFT>
    static void settle_all(const Settled& of, int rows, float* totals) {
        int m = 0;
        for (; m + 4 <= rows; m += 4) settle_some<SHIFT, 4>(of, m, totals);
        for (; m < rows; ++m) settle_some<SHIFT, 1>(of, m, totals);
    }
    // ROWS rows of x from row m on.
    template <Shift SHIFT, int ROWS>
    static QUANTLIB_INLINE void settle_some(const Settled& of, int m, float* totals) {
        Floats total[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) total[r] = load(totals + (m + r) * STRIP);
        const float *scales = of.scales, *shifts = of.shifts, *of_x = of.of_x + m, *sums = of.sums + m * STRIP;
        for (int64_t i = 0; i < of.count; ++i, sums += of.sums_stride) {
            const float* from = sums;
            for (int g = 0; g < of.together; ++g, from += of.group_stride, scales += STRIP, shifts += STRIP, of_x += of.of_x_stride) {
                const Floats scale = load(scales), shift = SHIFT == Shift::none ? zero() : load(shifts);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r) {
                    Floats sum = load(from + r * STRIP);
                    if constexpr (SHIFT == Shift::zero) sum = negative_multiply_add(shift, broadcast(of_x[r]), sum);
                    total[r] = multiply_add(sum, scale, total[r]);
                    if constexpr (SHIFT == Shift::minimum) total[r] = negative_multiply_add(shift, broadcast(of_x[r]), total[r]);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) store(totals + (m + r) * STRIP, total[r]);
    }
};

inline bool amx_strip(const Joined<LinearCall>& joined) {
    const LinearCall& first = joined.calls[0];
    const Plan& plan = *first.plan;
    const int64_t rows = rows_of(joined);
    if (first.m == 0 || rows == 0) return true;
    const StripNumbers numbers(plan);
    const StripTiles tiles(numbers.group() / EIGHTH, eighths_of(plan));
    const bool needs_sums = shift_of(plan) != Shift::none;
    const int threads = useful_threads(rows * plan.padded_k * least(first.m, X_TILES * tiles.rows()), first.threads);
    int64_t whole_floats = 0;
    for (int64_t i = 0; i < joined.count; ++i) whole_floats = most(whole_floats, WholeStrip::floats(*joined.calls[i].plan));
    const int64_t thread_floats = AmxStripMemory::size(numbers) + whole_floats;
    const AmxStripX most_rows(tiles, first.m, 0);  // no run has more
    const int64_t sums_floats = needs_sums ? most_rows.sums_in_all(tiles, numbers.groups_across()) : 0;
    const Scratch natural(round_up(plan.padded_k, SPAN) + WORDS), words(most_rows.words_in_all(tiles) / 2), sums(sums_floats);
    const Scratch scratch(threads * thread_floats);
    if (natural.floats == nullptr || words.floats == nullptr || sums.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* const to = reinterpret_cast<uint16_t*>(words.floats);
    for (int64_t start = 0; start < first.m; start += X_TILES * tiles.rows()) {
        AmxStripX x(tiles, first.m, start);
        if (x.rows * x.beside > x.count) memset(to, 0, x.words_in_all(tiles) * sizeof(uint16_t));  // lanes without a row
        for (int row = 0; row < x.count; ++row) {
            scatter_strip_row(first, tiles, x, row, reinterpret_cast<uint16_t*>(natural.floats), to, needs_sums ? sums.floats : nullptr);
        }
        x.words = to, x.sums = needs_sums ? sums.floats : nullptr;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int part = 0; part < threads; ++part) {
            float* const own = scratch.floats + part * thread_floats;
            const auto rows = [&](const LinearCall& call, int64_t first_row, int64_t last_row) {
                if (first_row == last_row) return;
                const AmxStripMemory memory(own);
                AmxStrip{call, tiles, x, numbers}.rows(first_row, last_row, memory, own + AmxStripMemory::size(numbers));
            };
            for_rows(joined, part, threads, rows, STRIP);
        }
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

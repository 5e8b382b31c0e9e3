// y[M, N] = x[M, K] W^T + bias in bf16 for few rows of x, in tile registers, W in strips of sixteen rows (strips.h): what a strip's codes
// come out as, pairs of columns of sixteen rows, are the rows of a tile. Codes become exact bf16 numbers in the first-level cache while
// the tile registers multiply what was decoded before; scales and zeros are applied to the fp32 sums of a block of columns, minima to
// those of x over it.
//
// A product of tiles adds up 32 columns. Where a block is narrower, lanes of x are pairs (block, row of x) whose columns of other blocks
// are zero, so that a code whose number is infinite makes NaN of them. For so few rows that registers have lanes to spare, sums of two
// tiles share one (amx_strip_x.h). A row of y depends neither on the number of threads nor on the other rows of x.
#pragma once

#include "amx_strip_x.h"

#ifdef QUANTLIB_HAS_TILES
namespace quantlib::cpu::QUANTLIB_ISA {

// Tiles of a strip that are scaled together. They are multiplied while the next ones are decoded: what was stored must have reached the
// cache, a tile waits for it.
constexpr int UNIT = 2;
// Sums in registers: of one or two tiles of x beside each other times four or two strips.
constexpr int SUM_TILES = 4;
// Bytes of a row's scales that are expanded at a time: those of all strips share the first-level cache with weights, sums and x.
constexpr int64_t SCALE_BYTES = 16;

// What one thread works in, for SUM_TILES strips.
struct AmxStripMemory {
    uint16_t* weights;  // [2][UNIT][strip] tiles
    float* sums;        // [2][UNIT][beside][strip] tiles
    float* totals;      // [strip][row of x][STRIP]
    float* numbers;

    static constexpr int64_t WEIGHT_FLOATS = 2 * UNIT * SUM_TILES * TILE_WORDS / 2, SUM_FLOATS = 2 * UNIT * SUM_TILES * TILE_FLOATS;
    static constexpr int64_t TOTAL_FLOATS = SUM_TILES * TILE * STRIP;
    static int64_t size(const StripNumbers& numbers) {
        return WEIGHT_FLOATS + SUM_FLOATS + TOTAL_FLOATS + SUM_TILES * round_up(numbers.floats(), LANES);
    }
    explicit AmxStripMemory(float* memory)
        : weights(reinterpret_cast<uint16_t*>(memory)), sums(memory + WEIGHT_FLOATS), totals(sums + SUM_FLOATS),
          numbers(totals + TOTAL_FLOATS) {}
};

struct AmxStrip {
    const LinearCall& call;
    const AmxStripX& x;
    const int64_t count;  // of tiles
    const StripNumbers& numbers;

    void rows(int64_t start, int64_t stop, const AmxStripMemory& memory, float* whole_memory) const {
        with_codes(*call.plan, [&](const auto& codes) {
            if (x.beside == 1) this->template all_rows<1>(codes, start, stop, memory, whole_memory);
            else this->template all_rows<X_TILES>(codes, start, stop, memory, whole_memory);
        });
    }

  private:
    // Some streams of strips, equal parts of the range apart: memory delivers several faster than one.
    template <int BESIDE, class Codes>
    void all_rows(const Codes& codes, int64_t start, int64_t stop, const AmxStripMemory& memory, float* whole_memory) const {
        constexpr int STREAMS = SUM_TILES / BESIDE;
        static_assert(SUM_TILES == 4);
        const TileRegisters registers(x.rows * x.groups);
        const Plan& plan = *call.plan;
        const int64_t number_floats = round_up(numbers.floats(), LANES);
        StripNumbers::Memory of_strip[SUM_TILES] = {{numbers, memory.numbers}, {numbers, memory.numbers + number_floats},
                                                    {numbers, memory.numbers + 2 * number_floats},
                                                    {numbers, memory.numbers + 3 * number_floats}};
        const WholeStrip whole(call, whole_memory);
        const int64_t strips = (stop - start + STRIP - 1) / STRIP, part = (strips + STREAMS - 1) / STREAMS;
        for (int64_t i = 0; i < part; ++i) {
            const int there = int(least(STREAMS, (strips - i + part - 1) / part));
            const auto row = [&](int s) { return start + (i + (s < there ? s : 0) * part) * STRIP; };
            const Planes strip[SUM_TILES] = {whole.planes(row(0)), whole.planes(row(1)), whole.planes(row(2)), whole.planes(row(3))};
            for (int s = 0; s < there; ++s) of_strip[s].begin(call.parts, row(s), least(STRIP, plan.n - row(s)));
            for (int64_t j = 0; j < there * x.count; ++j) store(memory.totals + j * STRIP, zero());
            multiply<BESIDE>(codes, strip, of_strip, there, memory);
            for (int s = 0; s < there; ++s) {
                write_products(call, x.first, x.first + x.count, row(s), least(STRIP, plan.n - row(s)),
                               memory.totals + s * x.count * STRIP, STRIP);
            }
        }
    }

    // totals = `there` strips times x.
    template <int BESIDE, class Codes>
    __attribute__((noinline)) void multiply(const Codes& kept, const Planes (&strip)[SUM_TILES],
                                            StripNumbers::Memory (&of_strip)[SUM_TILES], int there, const AmxStripMemory& memory) const {
        constexpr int STREAMS = SUM_TILES / BESIDE;
        constexpr int64_t TILES = STREAMS * TILE_WORDS;
        const Codes codes = kept;  // local copies stay in registers
        const Planes planes[SUM_TILES] = {strip[0], strip[1], strip[2], strip[3]};
        const StripTile* const tiles = x.tiles;
        const int64_t count = this->count;
        float* waiting = nullptr;  // where sums in registers belong that have ended
        Made before = {0, 0, 0};
        for (int64_t u = 0; u < (count + UNIT - 1) / UNIT + 1; ++u) {
            uint16_t* to = memory.weights + u % 2 * (UNIT * TILES);
            const uint16_t* from = memory.weights + (u + 1) % 2 * (UNIT * TILES);
            const StripTile *decoded = tiles + u * UNIT, *multiplied = u == 0 ? tiles : decoded - UNIT;
            Made made = {u % 2 * UNIT, multiplied->group, 0};
            for (int64_t i = 0; i < UNIT; ++i, to += TILES, from += TILES) {
                if (u * UNIT + i < count) {
#pragma GCC unroll 4
                    for (int s = 0; s < STREAMS; ++s) {
                        if (s < there) decode(codes, planes[s], decoded[i], to + s * TILE_WORDS);
                    }
                }
                // A product takes long: its sums are stored once more has been decoded.
                if (waiting != nullptr) store_sums(waiting);
                waiting = nullptr;
                if (u > 0 && (u - 1) * UNIT + i < count) {
                    const StripTile tile = multiplied[i];
                    if (tile.begins) zero_sums();
                    written(from);
                    if constexpr (BESIDE == 1) add_row_of_products(x.words + tile.words, from);
                    else add_products<BESIDE, STREAMS>(x.words + tile.words, x.lanes_words, WORDS * 2, from, TILE_WORDS, WORDS * 2);
                    if (tile.ends) waiting = memory.sums + made.at(made.count++);
                }
            }
            settle<BESIDE>(before, of_strip, strip, there, tiles[least((u + 1) * UNIT, count)].eighth, memory);
            before = made;
        }
        if (waiting != nullptr) store_sums(waiting);
        settle<BESIDE>(before, of_strip, strip, there, tiles[count].eighth, memory);
    }

    // One tile of a strip, whose last columns may be missing.
    template <class Codes>
    static QUANTLIB_INLINE void decode(const Codes& codes, const Planes& strip, const StripTile& tile, uint16_t* to) {
        if (tile.eighths == TILE_EIGHTHS) return decode_some<true>(codes, strip, tile, to);
        decode_some<false>(codes, strip, tile, to);
    }
    template <bool WHOLE, class Codes>
    static QUANTLIB_INLINE void decode_some(const Codes& codes, const Planes& strip, const StripTile& tile, uint16_t* to) {
        const int64_t eighth = tile.eighth;
#pragma GCC unroll 4
        for (int e = 0; e < TILE_EIGHTHS; ++e, to += TURNS * WORDS) {
            Words w[TURNS];
            if (WHOLE || e < tile.eighths) look_up_stages(codes, codes.raw_of_strip(strip, eighth + e, STRIP_AHEAD), w);
            else for (int v = 0; v < TURNS; ++v) w[v] = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int v = 0; v < TURNS; ++v) store_words(to + v * WORDS, w[v]);
        }
    }

    // Sums that one unit has left: of x.groups groups each.
    struct Made {
        int64_t first, group, count;
        int64_t at(int64_t i) const { return (first + i) * SUM_TILES * TILE_FLOATS; }
    };

    // totals += what a unit has left, under its scales. `eighth`: what will be decoded next.
    template <int BESIDE>
    inline void settle(const Made& made, StripNumbers::Memory (&of_strip)[SUM_TILES], const Planes (&strip)[SUM_TILES], int there,
                       int64_t eighth, const AmxStripMemory& memory) const {
        constexpr int STREAMS = SUM_TILES / BESIDE;
        for (int64_t i = 0; i < made.count;) {
            const int64_t group = made.group + i * x.groups, place = group & (numbers.groups() - 1);
            const int64_t count = least(made.count - i, (numbers.groups() - place) >> __builtin_ctz(x.groups));
            for (int s = 0; place == 0 && s < there; ++s) {
                of_strip[s].fill(group, least(numbers.groups(), numbers.groups_across() - group), x.groups,
                                 strip[s].plane[0] + line_of(*call.plan, eighth) + STRIP_AHEAD);
            }
            for (int b = 0; b < BESIDE; ++b) {
                const int first = b * x.rows;
                Settled<STREAMS> of = {};
                for (int s = 0; s < STREAMS; ++s) {
                    of.scales[s] = of_strip[s].scales() + place * STRIP, of.shifts[s] = of_strip[s].shifts() + place * STRIP;
                }
                of.of_x = x.sums + group * x.count + first, of.of_x_stride = x.count;
                of.sums = memory.sums + made.at(i) + b * STREAMS * TILE_FLOATS;
                of.group_stride = x.rows * STRIP, of.totals_stride = x.count * STRIP;
                of.count = count, of.groups = x.groups;
                settle_rows(of, int(least(x.rows, x.count - first)), memory.totals + first * STRIP);
            }
            i += count;
        }
    }

    // `count` tiles of sums of each strip, [groups][row of x] in each, and what they are scaled by.
    template <int STREAMS>
    struct Settled {
        const float *scales[STREAMS], *shifts[STREAMS];  // of the first group
        const float *of_x, *sums;                        // the former: sums of x over the first group
        int64_t of_x_stride, group_stride, totals_stride, count;
        int groups;
    };
    template <int STREAMS>
    inline void settle_rows(const Settled<STREAMS>& of, int rows, float* totals) const {
        switch (shift_of(*call.plan)) {
            case Shift::none: return settle_all<Shift::none>(of, rows, totals);
            case Shift::zero: return settle_all<Shift::zero>(of, rows, totals);
            case Shift::minimum: return settle_all<Shift::minimum>(of, rows, totals);
        }
    }
    template <Shift SHIFT, int STREAMS>
    static void settle_all(const Settled<STREAMS>& of, int rows, float* totals) {
        int m = 0;
        for (; m + 4 <= rows; m += 4) settle_some<SHIFT, 4>(of, m, totals);
        if (rows & 2) settle_some<SHIFT, 2>(of, m, totals), m += 2;
        if (rows & 1) settle_some<SHIFT, 1>(of, m, totals);
    }
    // ROWS rows of x from row m on. A sum waits for the one before: those of all strips do so together.
    template <Shift SHIFT, int ROWS, int STREAMS>
    static QUANTLIB_INLINE void settle_some(const Settled<STREAMS>& of, int m, float* totals) {
        Floats total[STREAMS][ROWS];
        totals += m * STRIP;
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; ++s) {
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) total[s][r] = load(totals + s * of.totals_stride + r * STRIP);
        }
        const float *of_x = of.of_x + m, *sums = of.sums + m * STRIP;
        int64_t place = 0;
        for (int64_t i = 0; i < of.count; ++i, sums += SUM_TILES * TILE_FLOATS) {
            const float* from = sums;
            for (int g = 0; g < of.groups; ++g, from += of.group_stride, place += STRIP, of_x += of.of_x_stride) {
#pragma GCC unroll 4
                for (int s = 0; s < STREAMS; ++s) {
                    const Floats scale = load(of.scales[s] + place), shift = SHIFT == Shift::none ? zero() : load(of.shifts[s] + place);
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; ++r) {
                        Floats sum = load(from + s * TILE_FLOATS + r * STRIP);
                        if constexpr (SHIFT == Shift::zero) sum = negative_multiply_add(shift, broadcast(of_x[r]), sum);
                        total[s][r] = multiply_add(sum, scale, total[s][r]);
                        if constexpr (SHIFT == Shift::minimum) total[s][r] = negative_multiply_add(shift, broadcast(of_x[r]), total[s][r]);
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; ++s) {
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) store(totals + s * of.totals_stride + r * STRIP, total[s][r]);
        }
    }
};

inline bool amx_strip(const Joined<LinearCall>& joined) {
    const LinearCall& first = joined.calls[0];
    const Plan& plan = *first.plan;
    const int64_t rows = rows_of(joined);
    if (first.m == 0 || rows == 0) return true;
    const StripNumbers numbers(plan, SCALE_BYTES);
    const StripTiles tiles(numbers.group() / EIGHTH, eighths_of(plan));
    const bool numbers_alone = finite(plan);
    const bool needs_sums = shift_of(plan) != Shift::none;
    const int threads = useful_threads(rows * plan.padded_k * least(first.m, X_TILES * tiles.rows()), first.threads);
    int64_t whole_floats = 0;
    for (int64_t i = 0; i < joined.count; ++i) whole_floats = most(whole_floats, WholeStrip::floats(*joined.calls[i].plan));
    const int64_t thread_floats = AmxStripMemory::size(numbers) + whole_floats;
    const AmxStripX most_rows(tiles, numbers_alone, first.m, 0);  // no run has more
    const int64_t natural_floats = round_up(plan.padded_k, SPAN) / 2, word_floats = most_rows.words_in_all(tiles) / 2;
    const int64_t cut_floats = round_up((tiles.count + 1) * int64_t(sizeof(StripTile) / sizeof(float)), LANES);
    const int64_t sum_floats = needs_sums ? most_rows.sums_in_all(numbers.groups_across()) : 0;
    const Scratch shared(natural_floats + word_floats + cut_floats + sum_floats), scratch(threads * thread_floats);
    if (shared.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* const natural = reinterpret_cast<uint16_t*>(shared.floats);
    uint16_t* const words = reinterpret_cast<uint16_t*>(shared.floats + natural_floats);
    StripTile* const cut = reinterpret_cast<StripTile*>(shared.floats + natural_floats + word_floats);
    float* const sums = needs_sums ? shared.floats + natural_floats + word_floats + cut_floats : nullptr;
    for (int64_t start = 0; start < first.m; start += X_TILES * tiles.rows()) {
        AmxStripX x(tiles, numbers_alone, first.m, start);
        x.words = words, x.sums = sums, x.tiles = cut;
        x.cut(tiles, cut);
        if (x.rows * x.beside > x.count) memset(words, 0, x.words_in_all(tiles) * sizeof(uint16_t));  // lanes without a row
        for (int row = 0; row < x.count; ++row) scatter_strip_row(first, tiles, x, row, natural, words, sums);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int part = 0; part < threads; ++part) {
            float* const own = scratch.floats + part * thread_floats;
            const auto rows = [&](const LinearCall& call, int64_t first_row, int64_t last_row) {
                if (first_row == last_row) return;
                const AmxStripMemory memory(own);
                AmxStrip{call, x, tiles.count, numbers}.rows(first_row, last_row, memory, own + AmxStripMemory::size(numbers));
            };
            for_rows(joined, part, threads, rows, STRIP);
        }
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

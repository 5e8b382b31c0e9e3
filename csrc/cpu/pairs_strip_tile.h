// y[M, N] = x[M, K] W^T + bias in bf16 for many rows of x, W in strips of sixteen rows (strips.h): codes of six strips go through the law
// in fp32, are rounded once to bf16 and lie in the second-level cache while every row of x passes by: three strips by eight rows of x
// at a time, whose sums stay in registers over the columns of a block.
//
// Sums over one block of columns are added to fp32 sums in memory, in ascending order, so that a row of y depends neither on threads nor
// on the other rows of x.
#pragma once

#include "pairs_strip.h"

#include <type_traits>

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int TILE_STRIPS = 3;                 // beside eight rows of x: 24 sums, three vectors of W and one of x
constexpr int BLOCK_STRIPS = 2 * TILE_STRIPS;  // that share what comes of x from the second-level cache
constexpr int STRIP_ROWS = BLOCK_STRIPS * STRIP;
constexpr int64_t STRIP_COLUMNS = 1024;                                 // of a block, or a few less
constexpr int64_t STRIP_VECTORS = STRIP_COLUMNS / EIGHTH * TURNS;       // of each of its strips
constexpr int64_t TILE_WORDS_OF_W = STRIP_VECTORS * TILE_STRIPS * WORDS;  // of three strips, side by side

// The numbers of eight columns of a strip, turn by turn, in fp32: those of the low and of the high words that pairs are made of.
template <class Codes>
struct WordNumbers {  // that bf16 holds
    static constexpr int STAGES = Codes::STAGES;
    using Raw = typename Codes::Raw;
    const Codes codes;
    explicit WordNumbers(const Plan& plan) : codes(plan) {}
    QUANTLIB_INLINE Raw raw_of_strip(const Planes& strip, int64_t eighth, int64_t ahead) const {
        return codes.raw_of_strip(strip, eighth, ahead);
    }
    template <int STAGE>
    QUANTLIB_INLINE void stage(const Raw& raw, Floats* low, Floats* high) const {
        Words w[TURNS / STAGES];
        codes.template stage<STAGE>(raw, w);
        for (int v = 0; v < TURNS / STAGES; ++v) low[v] = low_floats(w[v]), high[v] = high_floats(w[v]);
    }
};
// Of four bits: any numbers, by look-ups of 32 bits, which ignore the bits above a code.
struct NibbleNumbers {
    static constexpr int STAGES = TURNS;
    using Raw = Words;
    const Floats values;
    explicit NibbleNumbers(const Plan& plan) : values(load(plan.values)) {}
    QUANTLIB_INLINE Raw raw_of_strip(const Planes& strip, int64_t eighth, int64_t ahead) const {
        return strip_plane<4>(strip.plane[0], eighth, ahead);
    }
    template <int STAGE>
    QUANTLIB_INLINE void stage(const Raw& raw, Floats* low, Floats* high) const {
        *low = permute(_mm512_srli_epi32(raw, 4 * STAGE), values);
        *high = permute(_mm512_srli_epi32(raw, 16 + 4 * STAGE), values);
    }
};

// Eight columns of a strip -> bf16 weights, at `to` vector by vector, other strips' in between.
template <Shift SHIFT, int STAGE = 0, class Numbers>
QUANTLIB_INLINE void round_eighth(const Numbers& numbers, const typename Numbers::Raw& raw, Floats scale, Floats shift, uint16_t* to) {
    constexpr int WIDTH = TURNS / Numbers::STAGES;
    Floats low[WIDTH], high[WIDTH];
    numbers.template stage<STAGE>(raw, low, high);
    for (int v = 0; v < WIDTH; ++v) {
        // Rounding leaves the low words of all lanes in front of the high ones.
        const Words rounded = round_words(scaled<SHIFT>(low[v], scale, shift), scaled<SHIFT>(high[v], scale, shift));
        store_words(to + (STAGE * WIDTH + v) * (TILE_STRIPS * WORDS), mix_words(rounded));
    }
    if constexpr (STAGE + 1 < Numbers::STAGES) round_eighth<SHIFT, STAGE + 1>(numbers, raw, scale, shift, to);
}

// sums[m][strip] += COUNT strips times eight rows of x, over `vectors` vectors of each strip.
template <int COUNT>
__attribute__((noinline)) void multiply_strips(const uint16_t* weights, const uint16_t* x, int64_t vectors, float* sums) {
    Floats total[STRIP_XS][COUNT];
#pragma GCC unroll 24  // else sums go through memory, here and below
    for (int i = 0; i < STRIP_XS * COUNT; ++i) total[i / COUNT][i % COUNT] = zero();
    for (int64_t v = 0; v < vectors; ++v, weights += TILE_STRIPS * WORDS, x += STRIP_XS * 2) {
        Words w[COUNT];
        for (int s = 0; s < COUNT; ++s) w[s] = load_once(weights + s * WORDS);
#pragma GCC unroll 8
        for (int m = 0; m < STRIP_XS; ++m) {
            const Words a = same_pairs(x + m * 2);
#pragma GCC unroll 3
            for (int s = 0; s < COUNT; ++s) total[m][s] = dot(total[m][s], w[s], a);
        }
    }
#pragma GCC unroll 24
    for (int i = 0; i < STRIP_XS * COUNT; ++i) {
        float* to = sums + i / COUNT * STRIP_ROWS + i % COUNT * STRIP;
        store(to, add(load(to), total[i / COUNT][i % COUNT]));
    }
}

struct PairsStripTile {
    const LinearCall& call;
    const StripX& x;
    const StripNumbers& numbers;

    // Floats that rows() works in.
    static int64_t floats(const LinearCall& call, const StripNumbers& numbers) {
        return BLOCK_STRIPS / TILE_STRIPS * TILE_WORDS_OF_W / 2 + sums_floats(call) + round_up(numbers.floats(), LANES) +
               WholeStrip::floats(*call.plan);
    }

    void rows(int64_t start, int64_t stop, float* memory) const {
        with_decoder(*call.plan, [&](const auto& codes, auto shifted) {
            using Codes = std::decay_t<decltype(codes)>;
            using Numbers = std::conditional_t<std::is_same_v<Codes, BookCodes<4>>, NibbleNumbers, WordNumbers<Codes>>;
            const Numbers numbers(*call.plan);
            for (int64_t row = start; row < stop; row += STRIP_ROWS) {
                this->template block_rows<decltype(shifted)::shift>(numbers, row, least(STRIP_ROWS, stop - row), memory);
            }
        });
    }

  private:
    static int64_t sums_floats(const LinearCall& call) { return round_up(call.m, STRIP_XS) * STRIP_ROWS; }

    template <Shift SHIFT, class Codes>
    void block_rows(const Codes& codes, int64_t row, int64_t rows, float* memory) const {
        uint16_t* const weights = reinterpret_cast<uint16_t*>(memory);
        float* const sums = memory + BLOCK_STRIPS / TILE_STRIPS * TILE_WORDS_OF_W / 2;
        float* const placed = sums + sums_floats(call);
        const WholeStrip whole(call, placed + round_up(numbers.floats(), LANES));
        const int64_t strips = (rows + STRIP - 1) / STRIP, group = numbers.group() / EIGHTH;
        const int64_t block = most(group, STRIP_COLUMNS / EIGHTH / group * group);
        memset(sums, 0, sums_floats(call) * sizeof(float));
        for (int64_t first = 0; first < x.eighths; first += block) {
            const int64_t last = least(first + block, x.eighths);
            for (int64_t s = 0; s < strips; ++s) {
                StripNumbers::Memory of_strip(numbers, placed);
                const int64_t at = row + s * STRIP;
                of_strip.begin(call.parts, at, least(STRIP, call.plan->n - at));
                uint16_t* to = weights + s / TILE_STRIPS * TILE_WORDS_OF_W + s % TILE_STRIPS * WORDS;
                // What is decoded next: the same columns of the next strip.
                const int64_t ahead = s + 1 < strips ? STRIP * row_bytes_of(*call.plan) : STRIP_AHEAD;
                decode<SHIFT>(codes, whole.planes(at), of_strip, first, last, ahead, to);
            }
            multiply(strips, first, last, weights, sums);
        }
        write_products(call, row, rows, sums, STRIP_ROWS);
    }

    template <Shift SHIFT, class Codes>
    inline void decode(const Codes& kept, const Planes& strip, StripNumbers::Memory& of_strip, int64_t first, int64_t last, int64_t ahead,
                       uint16_t* to) const {
        const Codes codes = kept;  // a local copy stays in registers
        const int64_t group = numbers.group() / EIGHTH, stop = (last + group - 1) / group, unit = numbers.whole_groups();
        for (int64_t g = first / group / unit * unit; g < stop; g += unit) {
            of_strip.fill(g, least(unit, x.groups - g), strip.plane[0] + line_of(*call.plan, g * group) + ahead);
            for (int64_t i = most(g, first / group); i < least(g + unit, stop); ++i) {
                const int64_t place = (i - g) * STRIP, end = least((i + 1) * group, last);
                const Floats scale = load(of_strip.scales() + place);
                const Floats shift = SHIFT == Shift::none ? zero() : load(of_strip.shifts() + place);
                for (int64_t eighth = i * group; eighth < end; ++eighth, to += TURNS * TILE_STRIPS * WORDS) {
                    round_eighth<SHIFT>(codes, codes.raw_of_strip(strip, eighth, ahead), scale, shift, to);
                }
            }
        }
    }

    inline void multiply(int64_t strips, int64_t first, int64_t last, const uint16_t* weights, float* sums) const {
        const int64_t vectors = (last - first) * TURNS;
        for (int64_t m = 0; m < call.m; m += STRIP_XS) {
            const uint16_t* from = x.from(m) + first * TURNS * STRIP_XS * 2;
            for (int64_t s = 0; s < strips; s += TILE_STRIPS) {
                const uint16_t* w = weights + s / TILE_STRIPS * TILE_WORDS_OF_W;
                float* to = sums + m * STRIP_ROWS + s * STRIP;
                switch (least(TILE_STRIPS, strips - s)) {
                    case 1: multiply_strips<1>(w, from, vectors, to); break;
                    case 2: multiply_strips<2>(w, from, vectors, to); break;
                    default: multiply_strips<3>(w, from, vectors, to);
                }
            }
        }
    }
};

inline bool pairs_strip_tile(const LinearCall& call) {
    const Plan& plan = *call.plan;
    if (call.m == 0 || plan.n == 0) return true;
    const StripNumbers numbers(plan);
    const int64_t padded = round_up(call.m, STRIP_XS), eighths = eighths_of(plan);
    const int threads = useful_threads(plan.n * plan.padded_k * call.m, call.threads);
    const int64_t thread_floats = round_up(PairsStripTile::floats(call, numbers), LANES);
    const Scratch words(padded * eighths * TURNS), scratch(threads * thread_floats);
    if (words.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* arranged = reinterpret_cast<uint16_t*>(words.floats);
    const StripX x = {arranged, nullptr, eighths, numbers.groups_across(), 1};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t m = 0; m < call.m; m += STRIP_XS) {
        arrange_run(call, x, m, least(STRIP_XS, call.m - m), STRIP_XS, numbers.group(), arranged + m * x.row_words(), nullptr);
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        const PairsStripTile work{call, x, numbers};
        work.rows(share_start(plan.n, STRIP, part, threads), share_start(plan.n, STRIP, part + 1, threads),
                  scratch.floats + part * thread_floats);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

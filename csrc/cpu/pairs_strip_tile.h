// y[M, N] = x[M, K] W^T + bias in bf16 for many rows of x, W in strips of sixteen rows (strips.h): codes of six strips go through the law
// in fp32, are rounded once to bf16 and lie in the second-level cache while every row of x passes by: three strips by eight rows of x
// at a time, whose sums stay in registers over the columns of a block.
//
// Sums over one block of columns are added to fp32 sums in memory, in ascending order, so that a row of y depends neither on threads nor
// on the other rows of x.
#pragma once

#include "strip_round.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int TILE_STRIPS = 3;                 // beside eight rows of x: 24 sums, three vectors of W and one of x
constexpr int BLOCK_STRIPS = 2 * TILE_STRIPS;  // that share what comes of x from the second-level cache
constexpr int STRIP_ROWS = BLOCK_STRIPS * STRIP;
constexpr int64_t STRIP_COLUMNS = 1024;                                 // of a block, or a few less
constexpr int64_t STRIP_VECTORS = STRIP_COLUMNS / EIGHTH * TURNS;       // of each of its strips
constexpr int64_t TILE_WORDS_OF_W = STRIP_VECTORS * TILE_STRIPS * WORDS;  // of three strips, side by side

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
        with_strip_numbers(*call.plan, [&](const auto& numbers, auto shifted) {
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
                const int64_t at = row + s * STRIP;
                StripNumbers::Memory of_strip[1] = {{numbers, placed}};
                of_strip[0].begin(call.parts, at, least(STRIP, call.plan->n - at));
                uint16_t* to = weights + s / TILE_STRIPS * TILE_WORDS_OF_W + s % TILE_STRIPS * WORDS;
                // What is decoded next: the same columns of the next strip.
                const int64_t ahead = s + 1 < strips ? STRIP * row_bytes_of(*call.plan) : STRIP_AHEAD;
                round_strip<SHIFT, TILE_STRIPS * WORDS>(codes, numbers, {whole.planes(at)}, of_strip, first, last, ahead, to);
            }
            multiply(strips, first, last, weights, sums);
        }
        write_products(call, row, rows, sums, STRIP_ROWS);
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

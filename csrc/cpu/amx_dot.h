// y[M, N] = x[M, K] W^T + bias in bf16 for few rows of x, in tile registers, with codes as exact bf16 numbers: scales, zeros and
// minima are applied to fp32 sums of one block of columns, as in pairs_dot.h.
//
// A product of tiles adds up all 32 words of a row, and a span of SPAN columns has `groups` of them with a scale each. So x lies
// in tiles whose columns are pairs (row of x, group): words that belong to other groups are zero. A span of 32 rows of W is decoded
// into the first-level cache while the tile registers multiply the one before.
#pragma once

#include "pairs_round.h"
#include "pairs_x.h"
#include "simd_amx.h"

#ifdef QUANTLIB_HAS_TILES
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int STEP_ROWS = 2 * TILE;  // of W that are multiplied together
constexpr int64_t STEP_WORDS = STEP_ROWS * SPAN;

// x in tiles.
struct AmxX {
    int groups;            // of columns in a span, each with a scale
    int64_t count;         // tiles beside each other, of TILE / groups rows of x each
    const uint16_t* tiles;  // [spans][count][TURNS] tiles: row p has the pair of words p
    const float* sums;      // [spans][count][LANES]: of x over the columns of a lane's group; null where no format needs them

    static int64_t tiles_for(int64_t m, int groups) { return (m * groups + TILE - 1) / TILE; }
    const uint16_t* tile(int64_t span, int64_t which) const { return tiles + (span * count + which) * TURNS * TILE_WORDS; }
};

// Row m of x -> its lanes in every tile; `words` is the row as arrange_row left it, not parted.
inline void scatter_row(const AmxX& x, int64_t m, const uint16_t* words, int64_t spans, uint16_t* tiles, float* sums) {
    const int64_t lane = m * x.groups, pairs = TILE / x.groups;  // pairs of words in a group
    const int64_t which = lane / TILE, first = lane % TILE;
    for (int64_t span = 0; span < spans; ++span) {
        uint16_t* to = tiles + (span * x.count + which) * TURNS * TILE_WORDS;
        for (int turn = 0; turn < TURNS; ++turn) {
            const uint16_t* from = words + span * SPAN + turn * WORDS;
            for (int p = 0; p < TILE; ++p) memcpy(to + turn * TILE_WORDS + p * WORDS + (first + p / pairs) * 2, from + p * 2, 4);
        }
        if (sums == nullptr) continue;
        float lanes[LANES];
        sum_lanes(words + span * SPAN, 1, 1, lanes);
        float* total = sums + (span * x.count + which) * LANES + first;
        for (int p = 0; p < TILE; ++p) total[p / pairs] = p % pairs == 0 ? lanes[p] : total[p / pairs] + lanes[p];
    }
}

// What one thread works in.
struct AmxDotMemory {
    uint16_t* weights[2];  // [STEP_ROWS][SPAN] each, by turns
    float* sums[2];        // [2][tiles of x] tiles each: of one span, by turns
    float* totals;         // the same
    BlockNumbers numbers;  // of STEP_ROWS rows

    static int64_t size(const BlockNumbers& numbers, int64_t tiles) {
        return STEP_WORDS + 3 * 2 * tiles * TILE_FLOATS + round_up(numbers.floats(), LANES);
    }
    AmxDotMemory(const BlockNumbers& numbers, int64_t tiles, float* memory)
        : weights{reinterpret_cast<uint16_t*>(memory), reinterpret_cast<uint16_t*>(memory) + STEP_WORDS},
          sums{memory + STEP_WORDS, memory + STEP_WORDS + 2 * tiles * TILE_FLOATS},
          totals(sums[1] + 2 * tiles * TILE_FLOATS),
          numbers(numbers.in(totals + 2 * tiles * TILE_FLOATS)) {}
};

template <Shift SHIFT, class Codes>
class AmxDot {
  public:
    AmxDot(const LinearCall& call, const AmxX& x, int64_t spans, const AmxDotMemory& memory, const Codes& codes, float code_zero)
        : call_(call),
          plan_(*call.plan),
          x_(x),
          spans_(spans),
          memory_(memory),
          codes_(codes),
          code_zero_(code_zero),
          row_bytes_(plan_.padded_k * plan_.bits / 8) {}

    void rows(int64_t start, int64_t stop) const {
        const TileRegisters registers;
        for (int64_t row = start; row < stop; row += STEP_ROWS) step(row, least(STEP_ROWS, stop - row));
    }

  private:
    const LinearCall& call_;
    const Plan& plan_;
    const AmxX& x_;
    const int64_t spans_;
    const AmxDotMemory& memory_;
    const Codes codes_;
    const float code_zero_;  // subtracted from every number
    const int64_t row_bytes_;

    void step(int64_t row, int64_t rows) const {
        memory_.numbers.expand(call_.parts, row, rows);
        const int64_t floats = 2 * x_.count * TILE_FLOATS;
        for (int64_t i = 0; i < floats; i += LANES) store(memory_.totals + i, zero());
        // What one stage stores, the next reads a turn later: a tile waits until stores have reached the cache.
        for (int64_t span = 0; span < spans_ + 2; ++span) {
            if (span < spans_) decode_span(row, rows, span);
            if (span >= 1 && span <= spans_) multiply_span(span - 1);
            if (span >= 2) settle_span(span - 2);
        }
        write(row, rows);
    }

    // One span of each row; rows that are missing repeat the last.
    void decode_span(int64_t row, int64_t rows, int64_t span) const {
        const Codes codes = codes_;  // a local copy stays in registers
        uint16_t* to = memory_.weights[span % 2];
        const PairsRow first(plan_, call_.parts, row);
        if (span < first.whole()) {
            decode_rows(codes, WholeSpan(), first.planes(span), rows, to);
        } else {
            decode_rows(codes, first.part(), first.tail(), rows, to);
        }
    }

    template <class Stored>
    QUANTLIB_INLINE void decode_rows(const Codes& codes, const Stored& stored, Planes planes, int64_t rows, uint16_t* to) const {
        for (int64_t r = 0; r < STEP_ROWS; ++r, to += SPAN) {
            Words w[TURNS];
            look_up_span(codes, stored, planes, 0, w, STEP_ROWS * row_bytes_);
            for (int turn = 0; turn < TURNS; ++turn) store_words(to + turn * WORDS, w[turn]);
            if (r + 1 < rows) planes = further(planes);
        }
    }

    // The next row's.
    QUANTLIB_INLINE Planes further(const Planes& planes) const {
        return {{planes.plane[0] + row_bytes_, planes.plane[1] + row_bytes_, planes.plane[2] + row_bytes_}};
    }

    // A span's products -> sums.
    void multiply_span(int64_t span) const {
        const int64_t apart = x_.count * TILE_FLOATS;
        const TileRows a = {memory_.weights[span % 2], WORDS, TILE * SPAN, SPAN};
        int64_t which = 0;
        for (; which + 2 <= x_.count; which += 2) {
            const TileRows b = {x_.tile(span, which), TILE_WORDS, TURNS * TILE_WORDS, WORDS};
            multiply_tiles<true, 2, 2>(a, b, TURNS, {memory_.sums[span % 2] + which * TILE_FLOATS, apart, TILE_FLOATS, TILE});
        }
        if (which < x_.count) {
            const TileRows b = {x_.tile(span, which), TILE_WORDS, TURNS * TILE_WORDS, WORDS};
            multiply_tiles<true, 2, 1>(a, b, TURNS, {memory_.sums[span % 2] + which * TILE_FLOATS, apart, TILE_FLOATS, TILE});
        }
    }

    // totals += sums of a span under its scales.
    void settle_span(int64_t span) const {
        const Ints lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const Ints group = _mm512_and_si512(lane, _mm512_set1_epi32(x_.groups - 1));
        for (int64_t tile = 0; tile < 2 * x_.count; ++tile) {
            const int64_t which = tile % x_.count, first = tile / x_.count * TILE;
            const float* sums = memory_.sums[span % 2] + tile * TILE_FLOATS;
            float* totals = memory_.totals + tile * TILE_FLOATS;
            RowNumbers numbers = memory_.numbers.of(first, span * x_.groups);
            if (x_.sums == nullptr) {
                for (int r = 0; r < TILE; ++r, numbers = memory_.numbers.next(numbers)) {
                    const Floats scale = permute(group, load(numbers.scale));
                    store(totals + r * LANES, multiply_add(load(sums + r * LANES), scale, load(totals + r * LANES)));
                }
                continue;
            }
            const Floats of_x = load(x_.sums + (span * x_.count + which) * LANES), code_zero = broadcast(code_zero_);
            const Floats of_zeros = multiply(code_zero, of_x);
            for (int r = 0; r < TILE; ++r, numbers = memory_.numbers.next(numbers)) {
                Floats sum = load(sums + r * LANES), total = load(totals + r * LANES);
                const Floats scale = permute(group, load(numbers.scale));
                if constexpr (SHIFT == Shift::zero) {
                    sum = negative_multiply_add(add(code_zero, permute(group, load(numbers.zero))), of_x, sum);
                } else {
                    sum = subtract(sum, of_zeros);
                }
                total = multiply_add(sum, scale, total);
                if constexpr (SHIFT == Shift::minimum) {
                    total = negative_multiply_add(permute(group, load(numbers.minimum)), of_x, total);
                }
                store(totals + r * LANES, total);
            }
        }
    }

    // totals over all groups -> y.
    void write(int64_t row, int64_t rows) const {
        for (int64_t r = 0; r < rows; r += TILE) {
            for (int64_t which = 0; which < x_.count; ++which) {
                float* from = memory_.totals + (r / TILE * x_.count + which) * TILE_FLOATS;
                Words square[TILE];
                for (int i = 0; i < TILE; ++i) square[i] = load_words(from + i * LANES);
                transpose(square);
                const int64_t beside = TILE / x_.groups, first = which * beside, last = least(call_.m, first + beside);
                for (int64_t m = 0; m < beside; ++m) {
                    Floats sum = zero();
                    for (int g = 0; g < x_.groups; ++g) {
                        sum = add(sum, _mm512_castsi512_ps(square[m * x_.groups + g]));
                    }
                    store(from + m * LANES, sum);
                }
                write_products(call_, first, last, row + r, least(TILE, rows - r), from, LANES);
            }
        }
    }
};

template <Shift SHIFT, class Codes>
void amx_rows(const LinearCall& call, const AmxX& x, int64_t spans, const AmxDotMemory& memory, const Codes& codes, float code_zero,
              int64_t start, int64_t stop) {
    AmxDot<SHIFT, Codes>(call, x, spans, memory, codes, code_zero).rows(start, stop);
}

// Call `with` a decoder for this plan's codes, what is subtracted from them, and the number of code 0 where numbers are no values.
template <class With>
inline void with_exact_decoder(const Plan& plan, With with) {
    const auto shifted = [&](const auto& codes, float code_zero) {
        switch (shift_of(plan)) {
            case Shift::none: return with(codes, Shifted<Shift::none>(), code_zero);
            case Shift::zero: return with(codes, Shifted<Shift::zero>(), code_zero);
            case Shift::minimum: return with(codes, Shifted<Shift::minimum>(), code_zero);
        }
    };
    const auto integers = [&](const auto& codes) { shifted(codes, codes.book.ZERO + plan.offset); };
    if (plan.codec == CodecKind::affine) {
        switch (plan.bits) {
            case 2: return integers(BookCodes<2, IntegerBook<2>>(plan));
            case 3: return integers(BookCodes<3, IntegerBook<3>>(plan));
            case 4: return integers(BookCodes<4, IntegerBook<4>>(plan));
            case 5: return integers(BookCodes<5, IntegerBook<5>>(plan));
            case 6: return integers(BookCodes<6, IntegerBook<6>>(plan));
        }
    }
    with_codes(plan, [&](const auto& codes) { shifted(codes, 0.0f); });
}

inline bool amx_dot(const Joined<LinearCall>& joined) {
    const LinearCall& first = joined.calls[0];
    const Plan& plan = *first.plan;
    const int64_t spans = spans_of(plan.k), rows = rows_of(joined);
    if (first.m == 0 || rows == 0) return true;
    const int threads = useful_threads(rows * spans * SPAN * first.m, first.threads);
    const BlockNumbers numbers(plan, spans * SPAN, STEP_ROWS);
    const bool integers = plan.codec == CodecKind::affine && plan.bits <= 6;
    const bool needs_sums = shift_of(plan) != Shift::none || integers;
    AmxX x = {groups_of(plan), AmxX::tiles_for(first.m, groups_of(plan)), nullptr, nullptr};
    const int64_t tile_words = spans * x.count * TURNS * TILE_WORDS, sums_floats = needs_sums ? spans * x.count * LANES : 0;
    const int64_t thread_floats = AmxDotMemory::size(numbers, x.count);
    const Scratch words(spans * SPAN / 2), tiles(tile_words / 2), sums(sums_floats), scratch(threads * thread_floats);
    if (words.floats == nullptr || tiles.floats == nullptr || sums.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t *row = reinterpret_cast<uint16_t*>(words.floats), *to = reinterpret_cast<uint16_t*>(tiles.floats);
    memset(to, 0, tile_words * sizeof(uint16_t));
    memset(sums.floats, 0, sums_floats * sizeof(float));
    for (int64_t m = 0; m < first.m; ++m) {
        arrange_row(first, m, spans, false, row);
        scatter_row(x, m, row, spans, to, needs_sums ? sums.floats : nullptr);
    }
    x.tiles = to, x.sums = needs_sums ? sums.floats : nullptr;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        const AmxDotMemory memory(numbers, x.count, scratch.floats + part * thread_floats);
        for_rows(joined, part, threads, [&](const LinearCall& call, int64_t start, int64_t stop) {
            with_exact_decoder(plan, [&](const auto& codes, auto shifted, float code_zero) {
                amx_rows<decltype(shifted)::shift>(call, x, spans, memory, codes, code_zero, start, stop);
            });
        });
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

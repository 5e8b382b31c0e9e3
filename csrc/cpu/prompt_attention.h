// Causal attention for many positions at once, summed in fp32: scores of a tile of queries against a block of keys, then what the block
// adds to the tile's sums of values, which are kept as if the greatest score so far were the greatest of all and brought down where
// it was not.
//
//     keys of a block --turned over--> [terms of width][KEYS]   scores: lanes are keys; a term of a query meets all of them
//     values of a block --> [terms of KEYS][width]              sums: lanes are columns
//
// A term fills a lane: a number in fp32, or, of bf16 where there are products of bf16 pairs, two neighbours. There a key's weight is
// rounded to bf16, in what is summed of weights too.
//
// Every query is summed over its keys in ascending order: no result depends on the number of threads, nor on the queries beside it.
#pragma once

#include "gate.h"
#include "rows.h"
#include "simd_pairs.h"

namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int64_t PROMPT_KEYS = 512;                   // of a block: 128 KB each of keys and values of 64 columns
constexpr int PROMPT_QUERIES = 6;                      // of a tile
constexpr int PROMPT_COLUMNS = LANES == 16 ? 4 : 2;    // vectors of sums per query: registers hold 24, or 12
constexpr int PROMPT_SCORES = 2;                       // vectors of scores per query
constexpr int64_t PROMPT_STEP = PROMPT_SCORES * LANES;

// One head's share of the queries, between blocks of keys; a last tile that is not whole has room behind the last query.
struct PromptState {
    float* greatest;  // [m + PROMPT_QUERIES]
    float* total;     // the same: sum of weights
    float* sums;      // the same, [width padded] each
};

struct SingleTerms {
    static constexpr int NUMBERS = 1;
    static QUANTLIB_INLINE Floats add_product(Floats a, Floats b, Floats sum) { return multiply_add(a, b, sum); }
    // A row in memory -> its terms.
    static void read(DType dtype, const uint8_t* from, int64_t count, float* to) { read_numbers(dtype, from, count, to); }
    // NUMBERS rows, the first of them -> terms of a row with the next; null where there is none.
    static void read_rows(DType dtype, const uint8_t* first, const uint8_t*, int64_t count, float* to) {
        read(dtype, first, count, to);
    }
    // Put a vector of numbers in place of what is no longer read of a row of scores: number `key` and following. Returns what stands
    // there.
    static QUANTLIB_INLINE Floats keep(float* row, int64_t key, Floats numbers) {
        store(row + key, numbers);
        return numbers;
    }
};

#ifdef QUANTLIB_HAS_PAIRS
struct PairTerms {
    static constexpr int NUMBERS = 2;
    static QUANTLIB_INLINE Floats add_product(Floats a, Floats b, Floats sum) { return dot(sum, as_ints(a), as_ints(b)); }
    static void read(DType, const uint8_t* from, int64_t count, float* to) { memcpy(to, from, count * 2); }
    static void read_rows(DType, const uint8_t* first, const uint8_t* second, int64_t count, float* to) {
        for_vectors(count, [&](auto vector, int64_t i) QUANTLIB_LAMBDA {
            const Floats lower = vector.template load<DType::bfloat16>(first + i * 2);
            const Floats upper = second == nullptr ? zero() : vector.template load<DType::bfloat16>(second + i * 2);
            store(to + i, upper_words(lower, upper));
        });
    }
    static QUANTLIB_INLINE Floats keep(float* row, int64_t key, Floats numbers) {
        return store_rounded(reinterpret_cast<uint8_t*>(row) + key * 2, numbers);
    }
};
#endif

// sum[q][v] += a[q][i] * vector v of b[i], for `count` terms i in ascending order.
template <class Terms, int VECTORS_OF_B>
QUANTLIB_INLINE void add_products(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count,
                                  Floats (&sum)[PROMPT_QUERIES][VECTORS_OF_B]) {
    for (int64_t i = 0; i < count; ++i) {
        Floats vectors[VECTORS_OF_B];
        for (int v = 0; v < VECTORS_OF_B; ++v) vectors[v] = load(b + i * b_stride + v * LANES);
#pragma GCC unroll 8  // here and below: else sums go through memory
        for (int q = 0; q < PROMPT_QUERIES; ++q) {
            const Floats each = broadcast(a[q * a_stride + i]);
            for (int v = 0; v < VECTORS_OF_B; ++v) sum[q][v] = Terms::add_product(each, vectors[v], sum[q][v]);
        }
    }
}

template <class Terms>
struct PromptTile {
    const PromptAttentionCall& call;
    const int64_t padded;          // columns
    float *keys, *values;          // of the block: [terms of padded][PROMPT_KEYS], [terms of PROMPT_KEYS][padded]
    float *queries, *scores;       // of the tile: [PROMPT_QUERIES][padded], [PROMPT_QUERIES][PROMPT_KEYS]

    static constexpr int64_t terms(int64_t numbers) { return (numbers + Terms::NUMBERS - 1) / Terms::NUMBERS; }

    // Keys and values of the block, which begins at `start`: PROMPT_STEP from `first` on, zeros from position `stop` on.
    inline void read(int64_t first, int64_t start, int64_t stop, const uint8_t* key_from, const uint8_t* value_from) const {
        const int64_t size = item_size(call.dtype);
        for (int64_t key = first; key < first + PROMPT_STEP; ++key) {
            float* const row = queries;
            memset(row, 0, padded * sizeof(float));
            if (start + key < stop) Terms::read(call.dtype, key_from + (start + key) * call.key_stride * size, call.width, row);
            for (int64_t i = 0; i < terms(padded); ++i) keys[i * PROMPT_KEYS + key] = row[i];
        }
        const auto value_at = [&](int64_t position) {
            return position < stop ? value_from + position * call.value_stride * size : nullptr;
        };
        for (int64_t key = first; key < first + PROMPT_STEP; key += Terms::NUMBERS) {
            float* const row = values + key / Terms::NUMBERS * padded;
            memset(row, 0, padded * sizeof(float));
            const uint8_t *value = value_at(start + key), *next = value_at(start + key + 1);
            if (value != nullptr) Terms::read_rows(call.dtype, value, next, call.width, row);
        }
    }

    // scores = queries times keys, of `count` keys rounded up.
    inline void score(int64_t count) const {
        for (int64_t key = 0; key < count; key += PROMPT_STEP) {
            Floats sum[PROMPT_QUERIES][PROMPT_SCORES];
#pragma GCC unroll 8
            for (int q = 0; q < PROMPT_QUERIES; ++q) {
                for (int v = 0; v < PROMPT_SCORES; ++v) sum[q][v] = zero();
            }
            add_products<Terms>(queries, padded, keys + key, PROMPT_KEYS, terms(padded), sum);
#pragma GCC unroll 8
            for (int q = 0; q < PROMPT_QUERIES; ++q) {
                for (int v = 0; v < PROMPT_SCORES; ++v) {
                    store(scores + q * PROMPT_KEYS + key + v * LANES, multiply(sum[q][v], broadcast(call.scale)));
                }
            }
        }
    }

    // Scores of one query -> weights, 0 from key `own` on; returns what its sums so far are multiplied by.
    inline float weigh(int q, int64_t own, int64_t count, float& greatest, float& total) const {
        float* const score = scores + q * PROMPT_KEYS;
        const int64_t stop = round_up(count, PROMPT_STEP);
        if (own <= 0) {  // sees none of them
            memset(score, 0, stop * sizeof(float));
            return 1.0f;
        }
        for (int64_t key = own; key < stop; ++key) score[key] = -__builtin_inff();
        Floats highest = broadcast(greatest);
        for (int64_t key = 0; key < stop; key += LANES) highest = maximum(highest, load(score + key));
        const float now = greatest_lane(highest);
        Floats sum_of = zero();
        for (int64_t key = 0; key < stop; key += LANES) {
            const Floats weight = exponential(subtract(load(score + key), broadcast(now)));
            sum_of = add(sum_of, Terms::keep(score, key, weight));
        }
        float before[LANES];
        store(before, exponential(broadcast(greatest - now)));
        greatest = now;
        total = total * before[0] + sum(sum_of);
        return before[0];
    }

    // sums[q] = sums[q] * factor[q] + weights times values.
    inline void add_values(const float (&factor)[PROMPT_QUERIES], int64_t count, float* const (&sums)[PROMPT_QUERIES]) const {
        for (int64_t column = 0; column < padded; column += PROMPT_COLUMNS * LANES) {
            Floats sum[PROMPT_QUERIES][PROMPT_COLUMNS];
#pragma GCC unroll 8
            for (int q = 0; q < PROMPT_QUERIES; ++q) {
                for (int v = 0; v < PROMPT_COLUMNS; ++v) {
                    sum[q][v] = multiply(load(sums[q] + column + v * LANES), broadcast(factor[q]));
                }
            }
            add_products<Terms>(scores, PROMPT_KEYS, values + column, padded, terms(count), sum);
#pragma GCC unroll 8
            for (int q = 0; q < PROMPT_QUERIES; ++q) {
                for (int v = 0; v < PROMPT_COLUMNS; ++v) store(sums[q] + column + v * LANES, sum[q][v]);
            }
        }
    }

    // Queries first ... of a head with the block's keys, which begin at `start`.
    inline void run(int64_t head, int64_t first, int64_t start, int64_t stop, const PromptState& state) const {
        const int64_t last = least(call.m, first + PROMPT_QUERIES) - 1;
        const int64_t count = least(stop, call.start + last + 1) - start;  // keys that the last of them sees
        if (count <= 0) return;
        const int64_t size = item_size(call.dtype);
        float factor[PROMPT_QUERIES];
        float* sums[PROMPT_QUERIES];
        for (int q = 0; q < PROMPT_QUERIES; ++q) {
            const int64_t m = least(first + q, last);  // behind the last query stands the last again
            const uint8_t* from = static_cast<const uint8_t*>(call.q) + (m * call.q_stride + head * call.q_head_stride) * size;
            memset(queries + q * padded, 0, padded * sizeof(float));
            Terms::read(call.dtype, from, call.width, queries + q * padded);
        }
        score(count);
        for (int q = 0; q < PROMPT_QUERIES; ++q) {
            const int64_t m = first + q;
            factor[q] = weigh(q, call.start + least(m, last) + 1 - start, count, state.greatest[m], state.total[m]);
            sums[q] = state.sums + m * padded;
        }
        add_values(factor, count, sums);
    }
};

// Columns in whole passes of add_values.
inline int64_t prompt_width(int64_t width) { return round_up(width, PROMPT_COLUMNS * LANES); }

template <class Terms>
inline bool attend_prompt(const PromptAttentionCall& call) {
    if (call.m == 0) return true;
    const int64_t padded = prompt_width(call.width), positions = call.start + call.m, size = item_size(call.dtype);
    const int64_t group = call.heads / call.key_heads, tiles = (call.m + PROMPT_QUERIES - 1) / PROMPT_QUERIES;
    const int64_t room = call.m + PROMPT_QUERIES, head_floats = round_up(2 * room, LANES) + room * padded;
    const int64_t own = PROMPT_QUERIES * (padded + PROMPT_KEYS);
    const int threads = useful_threads(call.m * positions * call.width, call.threads);
    const Scratch block(2 * padded * PROMPT_KEYS), states(group * head_floats), scratch(threads * own);
    if (block.floats == nullptr || states.floats == nullptr || scratch.floats == nullptr) return false;
    float *const keys = block.floats, *const values = keys + padded * PROMPT_KEYS;
    const auto state_of = [&](int64_t h) {
        float* memory = states.floats + h * head_floats;
        return PromptState{memory, memory + room, memory + round_up(2 * room, LANES)};
    };

    for (int64_t key_head = 0; key_head < call.key_heads; ++key_head) {
        for (int64_t h = 0; h < group; ++h) {
            const PromptState state = state_of(h);
            memset(state.greatest, 0, head_floats * sizeof(float));
            for (int64_t m = 0; m < room; ++m) state.greatest[m] = -__builtin_inff();
        }
        const uint8_t* key_from = static_cast<const uint8_t*>(call.keys) + key_head * call.key_head_stride * size;
        const uint8_t* value_from = static_cast<const uint8_t*>(call.values) + key_head * call.value_head_stride * size;
        for (int64_t start = 0; start < positions; start += PROMPT_KEYS) {
            const int64_t stop = least(positions, start + PROMPT_KEYS), steps = round_up(stop - start, PROMPT_STEP) / PROMPT_STEP;
            const auto tile_of = [&](int part) {
                float* memory = scratch.floats + part * own;
                return PromptTile<Terms>{call, padded, keys, values, memory, memory + PROMPT_QUERIES * padded};
            };
#pragma omp parallel for schedule(static) num_threads(threads)
            for (int part = 0; part < threads; ++part) {
                for (int64_t step = part; step < steps; step += threads) {
                    tile_of(part).read(step * PROMPT_STEP, start, stop, key_from, value_from);
                }
            }
#pragma omp parallel for schedule(static) num_threads(threads)
            for (int part = 0; part < threads; ++part) {
                const PromptTile<Terms> tile = tile_of(part);
                for (int64_t at = part; at < group * tiles; at += threads) {  // later queries see more keys: by turns
                    tile.run(key_head * group + at / tiles, at % tiles * PROMPT_QUERIES, start, stop, state_of(at / tiles));
                }
            }
        }
        for (int64_t h = 0; h < group; ++h) {
            const PromptState state = state_of(h);
            for (int64_t m = 0; m < call.m; ++m) {
                float* const sums = state.sums + m * padded;
                const Floats share = broadcast(1.0f / state.total[m]);
                for (int64_t i = 0; i < padded; i += LANES) store(sums + i, multiply(load(sums + i), share));
                uint8_t* const to = static_cast<uint8_t*>(call.y) + (m * call.heads + key_head * group + h) * call.width * size;
                write_numbers(call.dtype, sums, call.width, to);
            }
        }
    }
    return true;
}

inline bool prompt_attention(const PromptAttentionCall& call) {
#ifdef QUANTLIB_HAS_PAIRS
    if (call.dtype == DType::bfloat16) return attend_prompt<PairTerms>(call);
#endif
    return attend_prompt<SingleTerms>(call);
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

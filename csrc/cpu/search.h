// The search for scales of least squared error (quantlib/formats/search.py), LANES blocks at a time, one block to a lane: a
// tile holds element j of all of them in one vector. So sums over a block need no sum across lanes, and what follows them
// (solving for a scale, rounding it, comparing errors) is done for LANES blocks at once.
//
//     tile[j] = | element j of block 0 | of block 1 | ... |       j = 0 .. B-1, B a power of two, at least 8
//
// Importances, where there are any, lie in a second tile of the same shape behind the first.
//
// Every operation is torch's, in the same order, NaN and infinity included; sums follow `tree_sum`.
#pragma once

#include "quantize_types.h"
#include "rounding.h"
#include "rows.h"

namespace quantlib::cpu::QUANTLIB_ISA {

// Sums over a block

template <int COUNT>
struct Sums {
    Floats at[COUNT];
};

template <int COUNT>
inline Sums<COUNT> add(const Sums<COUNT>& a, const Sums<COUNT>& b) {
    Sums<COUNT> total;
    for (int i = 0; i < COUNT; ++i) total.at[i] = add(a.at[i], b.at[i]);
    return total;
}

// The sum of term(0) .. term(size - 1), the upper half added to the lower one until one is left. Read from its root, that tree
// is T(j, s) = T(j, 2s) + T(j + s, 2s) with T(0, 1) at the root and terms where s = size: eight terms that lie size / 8 apart
// make a subtree, and finished subtrees wait on a stack for the one that they are added to.
template <int COUNT, class Term>
inline Sums<COUNT> tree_sum(int64_t size, const Term& term) {
    const int64_t step = size / 8;
    const auto eight = [&](int64_t j) {
        const auto pair = [&](int64_t k) { return add(term(j + k * step), term(j + (k + 4) * step)); };
        const Sums<COUNT> even = add(pair(0), pair(2));
        return add(even, add(pair(1), pair(3)));
    };
    Sums<COUNT> waiting[32], part = eight(0);
    int64_t j = 0;
    for (int64_t i = 1; i < step; ++i) {
        // `part` is the subtree i - 1: it closes one level for every trailing one of that number.
        int level = 0;
        for (; (i - 1) >> level & 1; ++level) part = add(waiting[level], part);
        waiting[level] = part;
        // j counts with its bits in reverse.
        int64_t bit = step >> 1;
        for (; j & bit; bit >>= 1) j ^= bit;
        j |= bit;
        part = eight(j);
    }
    for (int level = 0; (step - 1) >> level & 1; ++level) part = add(waiting[level], part);
    return part;
}

// LANES blocks

struct Fit {
    Floats scale, zero, minimum;
};

inline Fit pick(Mask which, const Fit& yes, const Fit& no) {
    return {pick(which, yes.scale, no.scale), pick(which, yes.zero, no.zero), pick(which, yes.minimum, no.minimum)};
}

struct Solution {
    Fit fit;
    Floats error;
};

// torch.minimum: NaN where either is.
inline Floats least_or_nan(Floats a, Floats b) { return pick(less(a, b), a, pick(equal(a, a), b, a)); }

inline void keep_better(Solution& best, const Solution& other) {
    best.fit = pick(less(other.error, best.error), other.fit, best.fit);
    best.error = least_or_nan(other.error, best.error);
}

// What a format has besides its scales.
enum class Grid { none, zero, minimum };

template <class Rounding, Grid GRID, bool WEIGHTED>
class Lanes {
  public:
    static constexpr int SUMS = GRID == Grid::minimum ? 3 : 2;
    struct Moments {
        Floats vv, vw, v;
    };

    // `tile`: `size` vectors, and as many importances.
    Lanes(const Coding& coding, int64_t size, const float* tile)
        : rounding_(coding), reciprocal_(coding.reciprocal), size_(size), tile_(tile) {}

    // Sums that no code changes: once per tile.
    inline void start() {
        const Sums<2> sums = tree_sum<2>(size_, [&](int64_t j) {
            const Floats own = weight(j), weighed = times_importance(own, j);
            return Sums<2>{{multiply(weighed, own), weighed}};
        });
        ww = sums.at[0], w = sums.at[1], one = broadcast(float(size_));
        if constexpr (WEIGHTED) {
            one = tree_sum<1>(size_, [&](int64_t j) { return Sums<1>{{importance(j)}}; }).at[0];
        }
    }
    Floats ww, w, one;

    inline Moments moments(const Fit& fit) const {
        const Floats inverse = pick(equal(fit.scale, zero()), zero(), divide(broadcast(1.0f), fit.scale));
        const Sums<SUMS> sums = tree_sum<SUMS>(size_, [&](int64_t j) {
            const Floats own = weight(j);
            Floats x = own;
            if constexpr (GRID == Grid::minimum) x = add(x, fit.minimum);
            x = multiply(x, inverse);
            if constexpr (GRID == Grid::zero) x = add(x, fit.zero);
            Floats v = rounding_.value(x);
            if constexpr (GRID == Grid::zero) v = subtract(v, fit.zero);
            Sums<SUMS> terms;
            const Floats weighed = times_importance(v, j);
            terms.at[0] = multiply(weighed, v), terms.at[1] = multiply(v, times_importance(own, j));
            if constexpr (GRID == Grid::minimum) terms.at[2] = weighed;
            return terms;
        });
        return {sums.at[0], sums.at[1], sums.at[SUMS - 1]};
    }

    // Moments.solve, Moments.error and TorchProblem._improve.
    inline Solution improve(const Fit& fit, const ScaleRounding& round) const {
        const Moments m = moments(fit);
        Fit solved = {divide(m.vw, m.vv), fit.zero, fit.minimum};
        if constexpr (GRID == Grid::minimum) {
            const Floats determinant = subtract(multiply(one, m.vv), multiply(m.v, m.v));
            const Floats scale = divide(subtract(multiply(one, m.vw), multiply(m.v, w)), determinant);
            const Floats found = divide(subtract(multiply(m.v, m.vw), multiply(m.vv, w)), determinant);
            solved.scale = pick(less(found, zero()), solved.scale, scale);
            solved.minimum = maximum(zero(), found);
        }
        solved.scale = round(solved.scale);
        const Floats error = error_of(m, solved), unsolved = error_of(m, fit);
        const Mask usable = both(less(error, unsolved), less(zero(), multiply(solved.scale, fit.scale)));
        return {pick(usable, solved, fit), pick(usable, error, unsolved)};
    }

    // The squared error of encoding and decoding.
    inline Floats true_error(const Fit& fit) const {
        const Mask empty = equal(fit.scale, zero());
        const Floats nonzero = pick(empty, broadcast(1.0f), fit.scale);
        const Floats inverse = divide(broadcast(1.0f), maximum(broadcast(1e-38f), nonzero));
        return tree_sum<1>(size_, [&](int64_t j) {
                   Floats x = weight(j);
                   if constexpr (GRID == Grid::minimum) x = add(x, fit.minimum);
                   x = pick(empty, zero(), reciprocal_ ? multiply(x, inverse) : divide(x, nonzero));
                   if constexpr (GRID == Grid::zero) x = add(x, fit.zero);
                   Floats v = rounding_.value(x);
                   if constexpr (GRID == Grid::zero) v = subtract(v, fit.zero);
                   v = multiply(v, fit.scale);
                   if constexpr (GRID == Grid::minimum) v = subtract(v, fit.minimum);
                   const Floats difference = subtract(v, weight(j));
                   return Sums<1>{{times_importance(multiply(difference, difference), j)}};
               }).at[0];
    }

  private:
    const Rounding rounding_;
    const bool reciprocal_;
    const int64_t size_;
    const float* tile_;

    inline Floats weight(int64_t j) const { return load(tile_ + j * LANES); }
    inline Floats importance(int64_t j) const { return load(tile_ + (size_ + j) * LANES); }
    inline Floats times_importance(Floats x, int64_t j) const {
        if constexpr (WEIGHTED) return multiply(x, importance(j));
        return x;
    }

    inline Floats error_of(const Moments& m, const Fit& fit) const {
        const Floats two = broadcast(2.0f);
        const Floats linear = multiply(multiply(two, fit.scale), m.vw);
        const Floats error = add(subtract(ww, linear), multiply(multiply(fit.scale, fit.scale), m.vv));
        if constexpr (GRID != Grid::minimum) return error;
        const Floats cross = multiply(multiply(two, fit.minimum), subtract(w, multiply(fit.scale, m.v)));
        return add(add(error, cross), multiply(multiply(fit.minimum, fit.minimum), one));
    }
};

// Blocks of a weight as tiles

struct Tiles {
    const Coding& coding;
    const Weight& weight;
    int64_t size;   // weights of a block
    int64_t count;  // blocks

    Tiles(const Coding& c, const Weight& w)
        : coding(c), weight(w), size(c.block_cols == 0 ? c.padded_k : c.block_cols), count(w.rows * c.blocks_across) {}

    // Blocks first .. first + LANES - 1 of `from`, numbers that lie as the weight's do, into `tile`; zeros beyond the last block.
    // `line`: room for one block.
    inline void read(const Weight& from, int64_t first, float* tile, float* line) const {
        const int64_t item = item_size(from.dtype);
        const uint8_t* data = static_cast<const uint8_t*>(from.data);
        for (int lane = 0; lane < LANES; ++lane) {
            const int64_t block = first + lane, row = block / coding.blocks_across;
            const int64_t column = (block - row * coding.blocks_across) * size;
            const int64_t held = block < count ? most(0, least(size, coding.k - column)) : 0;
            if (held > 0) read_numbers(from.dtype, data + (row * from.row_stride + column) * item, held, line);
            for (int64_t j = held; j < size; ++j) line[j] = 0.0f;
            for (int64_t j = 0; j < size; ++j) tile[j * LANES + lane] = line[j];
        }
    }

    inline Floats read_lanes(const float* numbers, int64_t first) const {
        if (numbers == nullptr) return zero();
        if (first + LANES <= count) return load(numbers + first);
        float some[LANES] = {};
        memcpy(some, numbers + first, (count - first) * sizeof(float));
        return load(some);
    }

    inline Fit read_fit(const Numbers& numbers, int64_t first) const {
        return {read_lanes(numbers.scale, first), read_lanes(numbers.zero, first), read_lanes(numbers.minimum, first)};
    }

    inline void write_lanes(float* numbers, int64_t first, Floats lanes) const {
        if (numbers == nullptr) return;
        if (first + LANES <= count) return store(numbers + first, lanes);
        float all[LANES];
        store(all, lanes);
        memcpy(numbers + first, all, (count - first) * sizeof(float));
    }
};

// Runs body(lanes, first) for every LANES blocks of a weight; threads split them.
template <class Rounding, Grid GRID, bool WEIGHTED, class Call, class Body>
Outcome for_tiles(const Call& call, int64_t work, const Body& body) {
    const Coding& coding = *call.coding;
    const Tiles tiles(coding, call.weight);
    const int64_t groups = round_up(tiles.count, LANES) / LANES, vectors = tiles.size * (WEIGHTED ? 2 : 1);
    const int64_t floats = round_up(vectors * LANES + tiles.size, CHUNK);
    const int threads = useful_threads(tiles.count * tiles.size * work, call.threads);
    const Scratch scratch(threads * floats);
    if (scratch.floats == nullptr) return Outcome::no_memory;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        float* tile = scratch.floats + part * floats;
        float* line = tile + vectors * LANES;
        Lanes<Rounding, GRID, WEIGHTED> lanes(coding, tiles.size, tile);
        for (int64_t g = groups * part / threads; g < groups * (part + 1) / threads; ++g) {
            tiles.read(call.weight, g * LANES, tile, line);
            if constexpr (WEIGHTED) tiles.read(call.importance, g * LANES, tile + tiles.size * LANES, line);
            body(tiles, lanes, g * LANES);
        }
    }
    return Outcome::done;
}

struct SearchBody {
    const SearchCall& call;
    const ScaleRounding round;
    explicit SearchBody(const SearchCall& c) : call(c), round(*c.coding, c.global_scale) {}

    template <class L>
    inline void operator()(const Tiles& tiles, L& lanes, int64_t first) const {
        lanes.start();
        Solution best = lanes.improve(tiles.read_fit(call.candidates[0], first), round);
        for (int64_t c = 1; c < call.candidate_count; ++c) {
            keep_better(best, lanes.improve(tiles.read_fit(call.candidates[c], first), round));
        }
        for (int step = 0; step < call.steps; ++step) keep_better(best, lanes.improve(best.fit, round));
        tiles.write_lanes(call.scale, first, best.fit.scale);
        tiles.write_lanes(call.zero, first, best.fit.zero);
        tiles.write_lanes(call.minimum, first, best.fit.minimum);
    }
};

struct SumsBody {
    const SumsCall& call;

    template <class L>
    inline void operator()(const Tiles& tiles, L& lanes, int64_t first) const {
        const Fit fit = tiles.read_fit(call.numbers, first);
        if (call.error != nullptr) tiles.write_lanes(call.error, first, lanes.true_error(fit));
        if (call.moments.vv == nullptr) return;
        lanes.start();
        const auto m = lanes.moments(fit);
        tiles.write_lanes(call.moments.vv, first, m.vv);
        tiles.write_lanes(call.moments.vw, first, m.vw);
        tiles.write_lanes(call.moments.v, first, m.v);
        tiles.write_lanes(call.moments.ww, first, lanes.ww);
        tiles.write_lanes(call.moments.w, first, lanes.w);
        tiles.write_lanes(call.moments.one, first, lanes.one);
    }
};

template <class Rounding, Grid GRID, class Call, class Body>
Outcome for_importance(const Call& call, int64_t work, const Body& body) {
    if (call.importance.data != nullptr) return for_tiles<Rounding, GRID, true>(call, work, body);
    return for_tiles<Rounding, GRID, false>(call, work, body);
}

template <class Rounding, class Call, class Body>
Outcome for_grid(const Call& call, int64_t work, const Body& body) {
    if (call.coding->has_minimum) return for_importance<Rounding, Grid::minimum>(call, work, body);
    if (call.coding->has_zero) return for_importance<Rounding, Grid::zero>(call, work, body);
    return for_importance<Rounding, Grid::none>(call, work, body);
}

template <class Call, class Body>
Outcome for_coding(const Call& call, int64_t work, const Body& body) {
    switch (call.coding->rounding) {
        case RoundingKind::affine: return for_grid<AffineRounding>(call, work, body);
        case RoundingKind::table: return for_grid<TableRounding>(call, work, body);
        default: return for_grid<MinifloatRounding>(call, work, body);
    }
}

inline Outcome sums(const SumsCall& call) { return for_coding(call, 2, SumsBody{call}); }

inline Outcome search(const SearchCall& call) { return for_coding(call, call.candidate_count, SearchBody(call)); }

}  // namespace quantlib::cpu::QUANTLIB_ISA

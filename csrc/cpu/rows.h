// One weight row as a stream of chunks, and each thread's scratch memory for it.
#pragma once

#include "codes.h"

namespace quantlib::cpu::QUANTLIB_ISA {

// Decodes one row, k rounded up to whole chunks; what comes out beyond column k is finite and means nothing.
// `numbers` have been filled by expand_row for this row.
class Row {
  public:
    Row(const Plan& plan, const Parts& parts, int64_t row, const RowNumbers& numbers)
        : plan_(plan),
          numbers_(numbers),
          whole_(plan.padded_k / CHUNK),
          planes_(planes_of(plan.bits, parts.codes + row * (plan.padded_k * plan.bits / 8), plan.padded_k)) {}

    // Decode chunks start..stop into the sink, which counts chunks from `start`. A sink serves one call.
    template <class Sink>
    inline void decode(DecodeLoop<Sink> loop, int64_t start, int64_t stop, Sink& sink) const {
        const int64_t inside = least(stop, whole_);
        if (start < inside) loop(plan_, moved(plan_.bits, planes_, start), numbers_from(start), inside - start, sink);
        if (most(start, inside) < stop) decode_tail(loop, start, sink);
    }

  private:
    const Plan& plan_;
    const RowNumbers numbers_;
    const int64_t whole_;  // chunks that lie inside the stored codes
    const Planes planes_;

    inline RowNumbers numbers_from(int64_t chunk) const {
        const int64_t pieces = chunk * (CHUNK / plan_.piece);
        return {numbers_.scale + pieces, numbers_.zero + pieces, numbers_.minimum + pieces, nullptr};
    }

    // The last chunk where the stored row ends inside it: decoded from a copy, so that no byte beyond the row is read.
    template <class Sink>
    inline void decode_tail(DecodeLoop<Sink> loop, int64_t start, Sink& sink) const {
        const TailChunk tail(plan_.bits, moved(plan_.bits, planes_, whole_), plan_.padded_k - whole_ * CHUNK);
        sink.skip(whole_ - start);
        loop(plan_, tail.planes(), numbers_from(whole_), 1, sink);
    }
};

// What a format subtracts, besides its scale: nothing, an integer before the scale, a float after it.
enum class Shift { none, zero, minimum };
inline Shift shift_of(const Plan& plan) {
    return plan.has_zero ? Shift::zero : plan.has_minimum ? Shift::minimum : Shift::none;
}

// A Shift as a type.
template <Shift SHIFT>
struct Shifted {
    static constexpr Shift shift = SHIFT;
};

// Floats that one row's numbers take.
inline int64_t numbers_size(const Plan& plan) { return 4 * row_capacity(plan); }

// Carve a row's numbers out of `memory`; what the format lacks stays zero.
inline RowNumbers carve_numbers(const Plan& plan, float* memory) {
    const int64_t capacity = row_capacity(plan);
    memset(memory, 0, numbers_size(plan) * sizeof(float));
    return {memory, memory + capacity, memory + 2 * capacity, memory + 3 * capacity};
}

// 64-byte aligned floats, freed at the end of the scope; null where memory is out.
struct Scratch {
    float* floats;
    explicit Scratch(int64_t count)
        : floats(static_cast<float*>(aligned_alloc(64, round_up(most(count, 1) * int64_t(sizeof(float)), 64)))) {}
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { free(floats); }
};

// Bytes between what is decoded and what is asked for: what arrives meanwhile must not be waited for.
constexpr int64_t FETCH_AHEAD = 2048;

// Kernels at the speed of memory multiply rows of W in pairs (DOT_ROWS), and write WRITE_ROWS of each half together.
constexpr int DOT_ROWS = 2, WRITE_ROWS = 16;

// Products [m][DOT_ROWS][WRITE_ROWS] of `rows` rows of W with every row of x, and the bias -> y.
inline void write_products(const LinearCall& call, int64_t row, int64_t rows, float* values) {
    uint8_t* y = static_cast<uint8_t*>(call.y);
    for (int64_t m = 0; m < call.m; ++m, values += DOT_ROWS * WRITE_ROWS) {
        for (int64_t r = 0; call.bias != nullptr && r < rows; ++r) values[r] += call.bias[row + r];
        write_numbers(call.dtype, values, rows, y + (m * call.plan->n + row) * item_size(call.dtype));
    }
}

// Call two_rows(first, second, where their products go) for rows start ... stop, and write what it makes. The rows of a pair lie
// half the range apart, so that each is one of a stream without gaps.
template <class TwoRows>
inline void multiply_row_pairs(const LinearCall& call, int64_t start, int64_t stop, float* values, TwoRows two_rows) {
    const int64_t half = (stop - start + 1) / 2;
    for (int64_t done = 0; done < half; done += WRITE_ROWS) {
        const int64_t first = start + done, second = first + half, count = least(WRITE_ROWS, half - done);
        for (int64_t r = 0; r < count; ++r) two_rows(first + r, least(second + r, stop - 1), values + r);
        write_products(call, first, count, values);
        write_products(call, second, least(count, stop - second), values + WRITE_ROWS);
    }
}

// A thread costs microseconds to wake: none for less than `grain` weights times rows of x.
inline int useful_threads(int64_t work, int threads) {
    constexpr int64_t grain = 1 << 18;
    return int(most(1, least(threads, work / grain)));
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

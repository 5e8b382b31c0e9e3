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

// One weight row in spans of SPAN columns: its codes, and a padded copy of the last span where the stored codes end inside it.
template <int SPAN>
class SpanRow {
  public:
    SpanRow(const Plan& plan, const Parts& parts, int64_t row)
        : whole_(plan.padded_k / SPAN),
          planes_(planes_of(plan.bits, parts.codes + row * (plan.padded_k * plan.bits / 8), plan.padded_k)) {
        for (int i = 0; i < 3 && whole_ * SPAN < plan.k; ++i) {
            const int width = PLANE_WIDTHS[plan.bits][i];
            memset(tail_[i], 0, SPAN);
            memcpy(tail_[i], planes_.plane[i] + whole_ * (SPAN * width / 8), (plan.padded_k - whole_ * SPAN) * width / 8);
        }
    }
    int64_t whole() const { return whole_; }
    const Planes& planes() const { return planes_; }
    Planes tail() const { return {{tail_[0], tail_[1], tail_[2]}}; }

  private:
    const int64_t whole_;  // spans that lie inside the stored codes
    const Planes planes_;
    uint8_t tail_[3][SPAN];
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

// A thread costs microseconds to wake: none for less than `grain` weights times rows of x.
inline int useful_threads(int64_t work, int threads) {
    constexpr int64_t grain = 1 << 18;
    return int(most(1, least(threads, work / grain)));
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

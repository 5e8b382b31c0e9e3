// One weight row as a stream of chunks, and each thread's scratch memory for it.
#pragma once

#include "codes.h"
#include "gate.h"

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

// The law, in fp32.
template <Shift SHIFT>
QUANTLIB_INLINE Floats scaled(Floats number, Floats scale, Floats shift) {
    if constexpr (SHIFT == Shift::zero) return multiply(subtract(number, shift), scale);
    if constexpr (SHIFT == Shift::minimum) return subtract(multiply(number, scale), shift);
    return multiply(number, scale);
}

// Floats that one row's numbers take.
inline int64_t numbers_size(const Plan& plan) { return 4 * row_capacity(plan); }

// Carve numbers with room for `capacity` each out of `memory`; what the format lacks stays zero.
inline RowNumbers carve(int64_t capacity, float* memory) {
    memset(memory, 0, 4 * capacity * sizeof(float));
    return {memory, memory + capacity, memory + 2 * capacity, memory + 3 * capacity};
}
inline RowNumbers carve_numbers(const Plan& plan, float* memory) { return carve(row_capacity(plan), memory); }

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

// Kernels at the speed of memory multiply DOT_ROWS rows of W at once, and write WRITE_ROWS neighbours together.
constexpr int DOT_ROWS = 2, WRITE_ROWS = 16;

// Products of `rows` rows of W with rows first ... last of x, which lie `stride` apart, and the bias -> y.
inline void write_products(const LinearCall& call, int64_t first, int64_t last, int64_t row, int64_t rows, float* values,
                           int64_t stride) {
    uint8_t* y = static_cast<uint8_t*>(call.y);
    for (int64_t m = first; m < last; ++m, values += stride) {
        for (int64_t r = 0; call.bias != nullptr && r < rows; ++r) values[r] += call.bias[row + r];
        write_numbers(call.dtype, values, rows, y + (m * call.plan->n + row) * item_size(call.dtype));
    }
}

// With every row of x.
inline void write_products(const LinearCall& call, int64_t row, int64_t rows, float* values, int64_t stride) {
    write_products(call, 0, call.m, row, rows, values, stride);
}

// What one thread works in that multiplies ROWS rows of W at once.
template <int ROWS>
struct DotMemory {
    const Run run;
    RowNumbers numbers[ROWS];  // of a run of rows each
    float* values;             // [m][ROWS][WRITE_ROWS]

    static int64_t size(const LinearCall& call, const Run& run) {
        return ROWS * (4 * run.capacity(*call.plan) + call.m * WRITE_ROWS);
    }
    DotMemory(const LinearCall& call, const Run& run, float* memory) : run(run) {
        const int64_t capacity = run.capacity(*call.plan);
        for (int r = 0; r < ROWS; ++r) numbers[r] = carve(capacity, memory + r * 4 * capacity);
        values = memory + ROWS * 4 * capacity;
    }
};

// Rows of W that follow each other, and their numbers as far as they have been expanded.
class Stream {
  public:
    Stream() = default;
    // `early`: rows that the first run falls short of a whole one, so that streams side by side don't expand at once.
    Stream(const Run& run, const RowNumbers& numbers, int64_t stop, int64_t early)
        : run_(run), numbers_(numbers), stop_(stop), early_(early) {}
    // The numbers of a row: the one asked for before, the next, or one anywhere. expand(row, rows, numbers) fills those of a run.
    template <class Expand>
    inline RowNumbers at(int64_t row, const Expand& expand) {
        if (row < first_ || row >= end_) {
            first_ = row, end_ = least(stop_, row + run_.rows - early_);
            early_ = 0;
            expand(first_, end_ - first_, numbers_);
        }
        const int64_t offset = (row - first_) * run_.stride;
        return {numbers_.scale + offset, numbers_.zero + offset, numbers_.minimum + offset, nullptr};
    }

  private:
    Run run_;
    RowNumbers numbers_ = {};
    int64_t stop_ = 0, early_ = 0, first_ = 0, end_ = 0;
};

// Call multiply(ROWS rows, their numbers, where their products go) for rows start ... stop, and write what it makes. The rows lie
// a ROWS-th of the range apart, so that each is one of a stream without gaps: memory delivers several of those faster than one.
template <int ROWS, class Expand, class Multiply>
inline void multiply_streams(const LinearCall& call, int64_t start, int64_t stop, const DotMemory<ROWS>& memory, Expand expand,
                             Multiply multiply) {
    const int64_t part = (stop - start + ROWS - 1) / ROWS;
    Stream streams[ROWS];
    for (int s = 0; s < ROWS; ++s) {
        streams[s] = Stream(memory.run, memory.numbers[s], least(stop, start + (s + 1) * part), memory.run.rows * s / ROWS);
    }
    for (int64_t done = 0; done < part; done += WRITE_ROWS) {
        const int64_t count = least(WRITE_ROWS, part - done);
        for (int64_t r = 0; r < count; ++r) {
            int64_t rows[ROWS];
            RowNumbers numbers[ROWS];
            for (int s = 0; s < ROWS; ++s) {
                rows[s] = least(start + s * part + done + r, stop - 1);
                numbers[s] = streams[s].at(rows[s], expand);
            }
            multiply(rows, numbers, memory.values + r);
        }
        for (int s = 0; s < ROWS; ++s) {
            const int64_t first = start + s * part + done;
            if (first >= stop) break;
            write_products(call, first, least(count, stop - first), memory.values + s * WRITE_ROWS, ROWS * WRITE_ROWS);
        }
    }
}

// Where the share of one of `threads` threads begins in `count`, of which `unit` stay together.
inline int64_t share_start(int64_t count, int64_t unit, int64_t part, int64_t threads) {
    return least(count, (count + unit - 1) / unit * part / threads * unit);
}

// Rows of one weight, and of all that are joined.
inline int64_t rows_of(const LinearCall& call) { return call.plan->n; }
inline int64_t rows_of(const DenseCall& call) { return call.n; }
template <class Call>
inline int64_t rows_of(const Joined<Call>& joined) {
    int64_t rows = 0;
    for (int64_t i = 0; i < joined.count; ++i) rows += rows_of(joined.calls[i]);
    return rows;
}

// Call rows(call, start, stop) for what one of `threads` threads does: its share of every weight. Of weights of one height it has
// the same rows, so that it need not wait for others to combine them. `unit` rows stay together.
template <class Call, class Rows>
inline void for_rows(const Joined<Call>& joined, int part, int threads, Rows rows, int64_t unit = 1) {
    const auto first_of = [&](int64_t n, int64_t part) { return share_start(n, unit, part, threads); };
    for (int64_t i = 0; i < joined.count; ++i) {
        const Call& call = joined.calls[i];
        const int64_t n = rows_of(call);
        rows(call, first_of(n, part), first_of(n, part + 1));
    }
    if (!joined.gated) return;
    const Call &first = joined.calls[0], &second = joined.calls[1];
    const int64_t n = rows_of(first), start = first_of(n, part), stop = first_of(n, part + 1);
    uint8_t* const y = at(first.y, first.dtype, start);
    gate({first.dtype, y, at(second.y, second.dtype, start), y, stop - start});
}

// A thread costs microseconds to wake: none for less than `grain` weights times rows of x.
inline int useful_threads(int64_t work, int threads) {
    constexpr int64_t grain = 1 << 17;
    return int(most(1, least(threads, work / grain)));
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

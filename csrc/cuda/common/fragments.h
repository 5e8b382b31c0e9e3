// A weight in the `fragments` layout (quantlib/layouts/fragments.py draws it), as kernels receive it, and the way of its words
// from global memory into a lane's registers.
//
// Kernels go along K in turns of 128 columns. A strip's words of one turn lie in one piece, `256 * bits` bytes a plane, and are
// copied 16 bytes a lane; the lane that needs them is another one where tiles have 128 columns, so that chunks are stored under
// a permutation that makes both ways of reading free of bank conflicts (`chunk_place`).
#pragma once

#include "numbers.h"
#include "weight.h"

namespace quantlib::cuda {

constexpr int STRIP = 16;     // rows of W
constexpr int TURN = 128;     // columns of W
constexpr int STEPS = TURN / 16;

// Where chunk i of 16 bytes lies in shared memory: lanes read chunks lane + 32 c, or 2 lane + c.
QL_DEVICE int chunk_place(int i) { return i ^ ((i >> 3) & 1); }

// One plane's words of one turn for one strip, by one warp. `wanted`: bytes of the strip from the turn's first on.
template <int BITS>
struct Plane {
    static constexpr int BYTES = 256 * BITS;
    static constexpr int CHUNKS = BYTES / 16;

    QL_DEVICE static void copy(std::byte* shared, const std::byte* global, int64_t wanted, int lane) {
#pragma unroll
        for (int first = 0; first < CHUNKS; first += 32) {
            int i = first + lane;
            if (CHUNKS >= 32 || i < CHUNKS) {
                copy_async<16>(shared + 16 * chunk_place(i), global + 16 * i, 16 * i < wanted);
            }
        }
    }

    // A lane's words: 4 bits, one a step; 2 bits, one for two steps; 1 bit, one for four; 8 bits, step s's of g at 8 (s / 4) +
    // 4 g + s % 4.
    static constexpr int WORDS = 2 * BITS;

    QL_DEVICE static void read(uint32_t (&words)[WORDS], const std::byte* shared, bool wide, int lane) {
        if constexpr (BITS == 1) {
            Words2 found = load_shared<Words2>(shared + 16 * chunk_place(lane >> 1) + 8 * (lane & 1));
            words[0] = found.w[0], words[1] = found.w[1];
        } else if constexpr (BITS == 2) {
            take(words, 0, load_shared<Words4>(shared + 16 * chunk_place(lane)));
        } else if constexpr (BITS == 4) {
            // By arithmetic: of a condition the compiler makes a branch inside the main loop.
            const int each = wide ? 2 : 1, next = wide ? 1 : 32;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                take(words, 4 * c, load_shared<Words4>(shared + 16 * chunk_place(each * lane + next * c)));
            }
        } else {
            const int each = wide ? 2 : 1, next_c = wide ? 1 : 64, next_g = wide ? 64 : 32;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
#pragma unroll
                for (int g = 0; g < 2; ++g) {
                    int i = each * lane + next_c * c + next_g * g;
                    take(words, 8 * c + 4 * g, load_shared<Words4>(shared + 16 * chunk_place(i)));
                }
            }
        }
    }

  private:
    QL_DEVICE static void take(uint32_t* words, int at, Words4 found) {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[at + i] = found.w[i];
    }
};

// A strip part (scales, zeros) of one turn: at most 128 bytes, copied by a warp, read entry by entry.
struct StripWords {
    int entry_bytes, row_bytes, unit_bytes;  // of an entry; of one row in a piece; of a piece
    int log_entries;                         // entries of a row in a piece
    int log_turn_units, log_unit_turns;      // pieces of a turn, or turns of a piece
    int units;
    int lane_unit;  // the piece that this lane copies from, -1: nothing
    int lane_row;   // where the entries of the lane's row r begin

    QL_DEVICE StripWords(const FragmentWeight& w, int entry_bytes, int lane) : entry_bytes(entry_bytes), units(w.units) {
        log_entries = w.group > 0 ? log2_of(w.unit_columns / w.group) : 0;
        row_bytes = entry_bytes << log_entries;
        if (row_bytes < 2) row_bytes = 2;
        unit_bytes = 16 * row_bytes;
        log_turn_units = w.unit_columns < TURN ? log2_of(TURN / w.unit_columns) : 0;
        log_unit_turns = w.unit_columns > TURN ? log2_of(w.unit_columns / TURN) : 0;
        lane_unit = 16 * lane < (unit_bytes << log_turn_units) ? 16 * lane / unit_bytes : -1;
        lane_row = (lane >> 2) * 2 * row_bytes;
    }

    QL_DEVICE void copy(std::byte* shared, const std::byte* part, int strip, int turn, int lane) const {
        int first = (turn << log_turn_units) >> log_unit_turns;
        if (lane_unit >= 0) {
            const std::byte* from = part + (int64_t(strip) * units + first) * unit_bytes + 16 * lane;
            copy_async<16>(shared + 16 * lane, from, first + lane_unit < units);
        }
    }

    // Where entry e of the turn lies, for the lane's row r; row r + 8 follows row_bytes behind.
    QL_DEVICE int place(int e) const {
        return lane_row + (e >> log_entries) * unit_bytes + (e & ((1 << log_entries) - 1)) * entry_bytes;
    }

  private:
    QL_DEVICE static int log2_of(int power) {
        int found = 0;
        while ((1 << found) < power) ++found;
        return found;
    }
};

QL_DEVICE float number_of(uint32_t bits, ScaleDType dtype) {
    if (dtype == ScaleDType::fp32) return from_bits(bits);
    return dtype == ScaleDType::bf16 ? from_bits(bits << 16) : low<Half>(bits);
}

QL_DEVICE int bytes_of(ScaleDType dtype) {
    return dtype == ScaleDType::fp32 ? 4 : dtype == ScaleDType::fp16 || dtype == ScaleDType::bf16 ? 2 : 1;
}

// Number i of an array of scales in global memory.
QL_DEVICE float scale_number(const std::byte* scales, int64_t i, ScaleDType dtype) {
    if (dtype == ScaleDType::fp32) return load_global<float>(scales + 4 * i);
    return number_of(load_global<uint16_t>(scales + 2 * i), dtype);
}

}  // namespace quantlib::cuda

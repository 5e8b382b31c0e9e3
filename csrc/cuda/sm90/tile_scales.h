// The scales of a piece of linear_tile, rows r and r + 8 of a lane, in two steps: `load` when the piece's products are about to
// start, `number` when they are over. Between the products nobody then waits for memory.
#pragma once

#include "tile_config.h"

namespace quantlib::cuda {

// Entries of a strip: what a consumer finds in a stage.
template <Scaling SCALING>
struct TileScales {
    using Narrow = std::conditional_t<SCALING == Scaling::half, uint16_t, uint8_t>;
    using Entry = std::conditional_t<SCALING == Scaling::single, uint32_t, Narrow>;
    uint32_t entry[2];

    QL_DEVICE void begin(const FragmentWeight&, const std::byte*, int, int) { entry[0] = entry[1] = 0; }

    QL_DEVICE void load(const FragmentWeight&, const uint32_t (&entries)[2], int) {
        entry[0] = entries[0], entry[1] = entries[1];
    }

    QL_DEVICE float number(const FragmentWeight& w, int h) const {
        if constexpr (SCALING == Scaling::power) return power_of_two(entry[h]);
        if constexpr (SCALING == Scaling::single) return from_bits(entry[h]);
        // Both readings, and then one of them: without a branch.
        float half = low<Half>(entry[h]), bf16 = from_bits(entry[h] << 16);
        return w.scale_dtype == ScaleDType::bf16 ? bf16 : half;
    }
};

// Double quantization: an entry is a code of the map; 256 blocks share an absmax.
template <>
struct TileScales<Scaling::twice> {
    using Entry = uint8_t;
    const std::byte* map;  // in shared memory
    int log_group;
    int before[2];  // blocks before the row's first
    float offset, mapped[2], absmax[2];

    QL_DEVICE void begin(const FragmentWeight& w, const std::byte* shared_map, int strip, int lane) {
        map = shared_map;
        log_group = 0;
        while ((1 << log_group) < w.group) ++log_group;
        QL_UNROLL
        for (int h = 0; h < 2; ++h) {
            int n = strip * STRIP + (lane >> 2) + 8 * h;
            before[h] = (n < w.n ? n : w.n - 1) * w.across;
            mapped[h] = absmax[h] = 0.0f;
        }
        offset = load_global<float>(w.absmax_offset);
    }

    QL_DEVICE void load(const FragmentWeight& w, const uint32_t (&entries)[2], int first_column) {
        int column = first_column >> log_group;
        if (column >= w.across) column = w.across - 1;
        QL_UNROLL
        for (int h = 0; h < 2; ++h) {
            mapped[h] = load_shared<float>(map + 4 * entries[h]);
            absmax[h] = load_global<float>(w.absmax + ((before[h] + column) >> 8));
        }
    }

    QL_DEVICE float number(const FragmentWeight&, int h) const {
        return add_rounded(multiply_rounded(mapped[h], absmax[h]), offset);
    }
};

// 2-D blocks, of 128 columns and whole strips.
template <>
struct TileScales<Scaling::grid> {
    using Entry = void;
    int64_t row;  // of blocks, where its numbers begin
    float found;

    QL_DEVICE void begin(const FragmentWeight& w, const std::byte*, int strip, int) {
        row = w.block_rows > 0 ? int64_t(strip * STRIP / w.block_rows) * w.across : 0;
        found = 0.0f;
    }

    QL_DEVICE void load(const FragmentWeight& w, const uint32_t (&)[2], int first_column) {
        int column = first_column / TURN;
        found = scale_number(w.scales, row + (column < w.across ? column : w.across - 1), w.scale_dtype);
    }

    QL_DEVICE float number(const FragmentWeight&, int) const { return found; }
};

}  // namespace quantlib::cuda

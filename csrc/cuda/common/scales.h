// The fp32 scale of a block of weights, for a lane's rows r and r + 8 of a strip.
#pragma once

#include "fragments.h"

namespace quantlib::cuda {

// Which scales there are. Those of blocks multiply fp32 sums block by block, or weights; those of whole rows or tensors come at the
// end where the sum runs along the row.
enum class Scaling {
    half,     // fp16 or bf16
    single,   // fp32
    power,    // E8M0
    twice,    // double quantization
    grid,     // 2-D blocks; or none in the loop
    weights,  // NVFP4: E4M3 per 16 columns, exact in the weight
};

template <Scaling SCALING>
struct BlockScales {
    const FragmentWeight& w;
    StripWords words;
    int log_steps;  // steps of a block, at most a turn; 4: no blocks along the row
    int row;        // the lane's row r of its strip

    QL_DEVICE BlockScales(const FragmentWeight& w, int lane) : w(w), words(w, bytes_of(w.scale_dtype), lane), row(lane >> 2) {
        log_steps = 4;
        if (w.scale_home == ScaleHome::strip) {
            log_steps = w.group >= 128 ? 3 : w.group == 64 ? 2 : w.group == 32 ? 1 : 0;
        } else if (SCALING == Scaling::grid && w.scale_home == ScaleHome::grid) {
            log_steps = 3;
        }
    }

    // A strip's entries of one turn -> shared memory.
    QL_DEVICE void copy(std::byte* shared, int strip, int turn, int lane) const {
        if (SCALING != Scaling::grid && w.scale_home == ScaleHome::strip) words.copy(shared, w.scales, strip, turn, lane);
    }

    // Block e of a turn, row r + 8 h. load: the turn's entries (SharedEntries, GlobalEntries).
    template <class Load>
    QL_DEVICE float number(const Load& load, int e, int h, int strip, int turn) const {
        if constexpr (SCALING == Scaling::grid) {
            int column = turn < w.across ? turn : w.across - 1;
            return scale_number(w.scales, int64_t(strip * STRIP / w.block_rows) * w.across + column, w.scale_dtype);
        } else if constexpr (SCALING == Scaling::twice) {
            int n = strip * STRIP + row + 8 * h, column = ((turn * STEPS) >> log_steps) + e;
            if (n >= w.n) n = w.n - 1;
            if (column >= w.across) column = w.across - 1;
            float absmax = load_global<float>(w.absmax + (int64_t(n) * w.across + column) / 256);
            float mapped = load_global<float>(w.scale_map + load.template at<uint8_t>(place(e, h)));
            return add_rounded(multiply_rounded(mapped, absmax), load_global<float>(w.absmax_offset));
        } else if constexpr (SCALING == Scaling::single) {
            return load.template at<float>(place(e, h));
        } else if constexpr (SCALING == Scaling::power) {
            return power_of_two(load.template at<uint8_t>(place(e, h)));
        } else {
            uint32_t bits = load.template at<uint16_t>(place(e, h));
            return w.scale_dtype == ScaleDType::bf16 ? from_bits(bits << 16) : low<Half>(bits);
        }
    }

    QL_DEVICE int place(int e, int h) const { return words.place(e) + h * words.row_bytes; }

    // The scale of row n where it belongs to whole rows or the tensor; else 1.
    QL_DEVICE float of_row(int n) const {
        if (w.scale_home == ScaleHome::row) return scale_number(w.scales, n < w.n ? n : w.n - 1, w.scale_dtype);
        if (w.scale_home == ScaleHome::tensor) return scale_number(w.scales, 0, w.scale_dtype);
        return 1.0f;
    }
};

// Where a turn's entries are loaded from.
struct SharedEntries {
    const std::byte* begin;
    template <class V>
    QL_DEVICE V at(int place) const {
        return load_shared<V>(begin + place);
    }
};

struct GlobalEntries {
    const std::byte* begin;
    template <class V>
    QL_DEVICE V at(int place) const {
        return load_global<V>(begin + place);
    }
};

}  // namespace quantlib::cuda

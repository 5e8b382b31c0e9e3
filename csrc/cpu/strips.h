// The layout `cpu_rows` (quantlib/layouts/strips.py): codes of STRIP rows lie side by side, 32 bits of each by turns, so that a vector
// is one place of sixteen rows; and so do scales, zeros and minima of blocks of one row and up to 1024 columns, in whole words, unless
// they are quantized themselves.
//
//     word w of row r of a strip of `rows` rows: (w * rows + r) * 4 bytes behind the strip's first, which is that of its rows in `rows`
#pragma once

#include "rows.h"

namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int STRIP = 16;
constexpr int WORD_BYTES = 4;
constexpr int64_t STRIP_AHEAD = 8192;  // bytes between what is read and what is asked for

inline int64_t row_bytes_of(const Plan& plan) { return plan.padded_k * plan.bits / 8; }

// Words first ... last of rows row ... row + count of one strip, as the layout `rows` has them, rows `row_bytes` apart.
inline void read_strip(const uint8_t* strip, int64_t strip_rows, int64_t row, int64_t count, int64_t first, int64_t last,
                       int64_t row_bytes, uint8_t* to) {
    int64_t word = first;
#ifdef QUANTLIB_HAS_TRANSPOSE
    static_assert(LANES == STRIP);
    for (; strip_rows == STRIP && count == STRIP && word + LANES <= last; word += LANES) {
        Ints square[LANES];
        for (int i = 0; i < LANES; ++i) {
            const uint8_t* from = strip + (word + i) * (STRIP * WORD_BYTES);
            fetch_once(from + STRIP_AHEAD);
            square[i] = load_ints(from);
        }
        transpose(square);
        for (int r = 0; r < STRIP; ++r) store_ints(to + r * row_bytes + word * WORD_BYTES, square[r]);
    }
#endif
    for (; word < last; ++word) {
        const uint8_t* from = strip + (word * strip_rows + row) * WORD_BYTES;
        for (int64_t r = 0; r < count; ++r) memcpy(to + r * row_bytes + word * WORD_BYTES, from + r * WORD_BYTES, WORD_BYTES);
    }
}

// Rows that a thread's share of W is a multiple of, where `rows` suits a kernel.
inline int64_t share_of(const Plan& plan, int64_t rows) { return plan.strips ? STRIP : rows; }

constexpr int64_t WIDEST_BLOCK = 1024;  // columns; the numbers of wider ones stay as in `rows`

// Scales, zeros and minima of one kind: bytes of a row, and whether they lie in strips too.
struct NumberPart {
    const uint8_t* Parts::*part;
    int64_t row_bytes;
    bool moved;
};
struct NumberParts {
    NumberPart all[5];
    int count = 0;

    explicit NumberParts(const Plan& plan) {
        const bool super = plan.scale == ScaleKind::super;
        const int64_t across = plan.blocks_across, size = plan.scale == ScaleKind::number ? item_size(plan.scale_dtype) : 1;
        const int64_t bytes = super ? (across * plan.super_bits + 7) / 8 : across * size;
        add(plan, &Parts::scales, bytes);
        if (plan.has_minimum) add(plan, &Parts::minima, bytes);
        if (plan.has_zero) add(plan, &Parts::zeros, across);
        if (super) add(plan, &Parts::super_scales, plan.supers_across * 2);
        if (super && plan.has_minimum) add(plan, &Parts::super_minima, plan.supers_across * 2);
    }
    const NumberPart& of(const uint8_t* Parts::*part) const {
        int i = 0;
        while (all[i].part != part) ++i;
        return all[i];
    }
    int64_t row_bytes() const {
        int64_t bytes = 0;
        for (int i = 0; i < count; ++i) bytes += all[i].row_bytes;
        return bytes;
    }

  private:
    void add(const Plan& plan, const uint8_t* Parts::*part, int64_t bytes) {
        const bool own = plan.block_rows == 1 && plan.block_cols > 0 && plan.block_cols <= WIDEST_BLOCK;
        const bool once = plan.scale != ScaleKind::double_quant && plan.scale != ScaleKind::super;
        all[count++] = {part, bytes, plan.strips && own && once && bytes % WORD_BYTES == 0};
    }
};

// What reads the parts of some rows as the layout `rows` has them, whatever layout a weight lies in.
class PartRows {
  public:
    // Floats of memory for `rows` rows at once.
    static int64_t floats(const Plan& plan, int64_t rows = STRIP) {
        if (!plan.strips) return 0;
        return round_up(rows * (row_bytes_of(plan) + round_up(NumberParts(plan).row_bytes(), 64)) / 4, LANES);
    }

    PartRows(const Plan& plan, float* memory, int64_t rows = STRIP)
        : plan_(plan), parts_(plan), memory_(reinterpret_cast<uint8_t*>(memory)), rows_(rows) {}

    // What can be read of a row that lies in the strip of the one asked for before, or in any other.
    const Parts& of(const Parts& all, int64_t row) {
        if (!plan_.strips) return all;
        if (row / STRIP != strip_) {
            strip_ = row / STRIP;
            const int64_t first = strip_ * STRIP, count = least(STRIP, plan_.n - first);
            read_ = codes(numbers(all, first, count), first, count, 0, plan_.padded_k);
        }
        return read_;
    }

    // All the parts, of which codes in columns start ... stop of rows row ... row + count can be read; `start` is a multiple of 32.
    Parts codes(const Parts& all, int64_t row, int64_t count, int64_t start, int64_t stop) const {
        if (!plan_.strips) return all;
        const int64_t row_bytes = row_bytes_of(plan_), end = least(stop, plan_.padded_k);
        int64_t plane = 0;  // its first word
        for (int i = 0; i < 3; ++i) {
            const int width = PLANE_WIDTHS[plan_.bits][i];
            if (width == 0 || start >= end) break;
            read(all.codes, row_bytes, row, count, plane + start * width / 32, plane + (end * width + 31) / 32, memory_);
            plane += plan_.padded_k * width / 32;
        }
        Parts found = all;
        found.codes = memory_ - row * row_bytes;
        return found;
    }

    // All the parts, of which scales, zeros and minima of rows row ... row + count can be read.
    Parts numbers(const Parts& all, int64_t row, int64_t count) const {
        Parts found = all;
        uint8_t* to = memory_ + rows_ * row_bytes_of(plan_);
        for (int i = 0; i < parts_.count; ++i) {
            const NumberPart& part = parts_.all[i];
            if (!part.moved) continue;
            read(all.*part.part, part.row_bytes, row, count, 0, part.row_bytes / WORD_BYTES, to);
            found.*part.part = to - row * part.row_bytes;
            to += rows_ * part.row_bytes;
        }
        return found;
    }

  private:
    const Plan& plan_;
    const NumberParts parts_;
    uint8_t* const memory_;
    const int64_t rows_;  // that there is room for
    Parts read_ = {};
    int64_t strip_ = -1;

    void read(const uint8_t* from, int64_t row_bytes, int64_t row, int64_t count, int64_t first_word, int64_t last_word,
              uint8_t* to) const {
        for (int64_t r = row; r < row + count;) {
            const int64_t first = r / STRIP * STRIP, strip_rows = least(STRIP, plan_.n - first);
            const int64_t taken = least(first + strip_rows, row + count) - r;
            read_strip(from + first * row_bytes, strip_rows, r - first, taken, first_word, last_word, row_bytes,
                       to + (r - row) * row_bytes);
            r += taken;
        }
    }
};

}  // namespace quantlib::cpu::QUANTLIB_ISA

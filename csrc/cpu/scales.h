// The fp32 scale, zero and minimum of one weight row, expanded to one number per piece of columns, so that the
// decoding loop knows nothing of block sizes and scale kinds. Each number is computed as quantlib/formats/scales.py does.
#pragma once

#include "convert.h"
#include "planes.h"
#include "simd_vbmi.h"

namespace quantlib::cpu::QUANTLIB_ISA {

// One row's numbers, with room for row_capacity each. Where a format has only one of `zero` and `minimum`, the other holds
// zeros: x - 0 is x.
struct RowNumbers {
    float* scale;
    float* zero;
    float* minimum;
    float* blocks;  // scratch: one number per block
};

// Pieces of `piece` columns, as many as whole runs of 128 columns have.
inline int64_t pieces_of(const Plan& plan, int piece) { return round_up(plan.k, 128) / piece; }

// Room for every block of a row and for every piece, and 64 to spare: so many may be written at once.
inline int64_t row_capacity(const Plan& plan) {
    return round_up(most(pieces_of(plan, plan.piece), plan.blocks_across) + 64, CHUNK);
}

#ifndef QUANTLIB_HAS_E4M3_RUN
constexpr int E4M3_RUN = LANES;  // E4M3 codes that are read together
inline void read_e4m3_run(const uint8_t* codes, Floats factor, float* to) { store(to, multiply(load_e4m3(codes), factor)); }
#endif

// E4M3 codes times `factor`; `to` has 64 numbers to spare.
inline void read_e4m3(const uint8_t* codes, int64_t count, float factor, float* to) {
    const Floats scale = broadcast(factor);
    int64_t i = 0;
    for (; i + E4M3_RUN <= count; i += E4M3_RUN) read_e4m3_run(codes + i, scale, to + i);
    if (i == count) return;
    uint8_t run[64] = {};  // so that no byte beyond the codes is read
    memcpy(run, codes + i, count - i);
    read_e4m3_run(run, scale, to + i);
}

inline void read_e8m0(const uint8_t* codes, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits = uint32_t(codes[i]) << 23;
        bits = codes[i] == 0 ? 1u << 22 : bits;  // 2^-127 is subnormal
        bits = codes[i] == 255 ? 0x7FC00000u : bits;
        memcpy(to + i, &bits, 4);
    }
}

inline void read_double_quant(const Plan& plan, const Parts& parts, int64_t first, int64_t count, float* to) {
    const float offset = *parts.scale_offset;
    for (int64_t g = 0; g < count; ++g) {
        const float step = plan.scale_values[parts.scales[first + g]] * parts.scale_absmax[(first + g) >> 8];
        to[g] = step + offset;
    }
}

inline void read_integers(int bits, const uint8_t* row, int64_t count, float* to) {
    switch (bits) {
        case 1: return read_codes<1>(row, count, to);
        case 2: return read_codes<2>(row, count, to);
        case 3: return read_codes<3>(row, count, to);
        case 4: return read_codes<4>(row, count, to);
        case 5: return read_codes<5>(row, count, to);
        case 6: return read_codes<6>(row, count, to);
        case 7: return read_codes<7>(row, count, to);
        default: return read_codes<8>(row, count, to);
    }
}

// to[i] = (to[i] - offset) * units[i / COUNT], a whole number of vectors: `to` and `units` have that much room.
template <int COUNT>
inline void scale_supers(float* to, const float* units, int64_t count, float offset) {
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats unit = spread<COUNT>(units + i / CHUNK * (CHUNK / COUNT), int(i % CHUNK / LANES));
        store(to + i, multiply(subtract(load(to + i), broadcast(offset)), unit));
    }
}

// Scales of scales: `rows` rows of blocks, whose codes are packed row by row.
struct SuperRows {
    int64_t across, row_bytes, unit_bytes;
    const uint8_t *codes, *units;  // of the first row
    SuperRows(const Plan& plan, const uint8_t* all_codes, const uint8_t* all_units, int64_t block_row)
        : across(plan.blocks_across), row_bytes((across * plan.super_bits + 7) / 8),
          unit_bytes(plan.supers_across * 2), codes(all_codes + block_row * row_bytes),
          units(all_units + block_row * unit_bytes) {}

    static constexpr int64_t MOST = 1024;  // codes that are read together
    // The planes of short rows are moved together first: most of what is read at once would be empty.
    bool joins(int64_t rows) const { return rows > 1 && across % 64 != 0 && across % 8 == 0 && rows * across <= MOST; }
};

#ifdef QUANTLIB_HAS_SIX
constexpr int SIX_RUN = 64, SIX_UNITS = SIX_RUN / 8;  // codes of K-quants that are read together, and their units

// to[i] = (code - offset) * its unit for `count` codes, a multiple of eight, eight of which share a unit. `to` has room for whole
// runs; behind the last code comes what means nothing.
inline void read_six(const Planes& planes, const uint8_t* units, int64_t count, const SixNumbers& numbers, float* to) {
    const int64_t whole = count / SIX_RUN * SIX_RUN, rest = count - whole;
    for (int64_t i = 0; i < whole; i += SIX_RUN) {
        read_six_run(planes.plane[0] + i / 2, planes.plane[1] + i / 4, units + i / 4, numbers, to + i);
    }
    if (rest == 0) return;
    // From a copy, so that no byte beyond the codes is read.
    uint8_t fours[SIX_RUN / 2] = {}, twos[SIX_RUN / 4] = {}, tail[SIX_UNITS * 2] = {};
    memcpy(fours, planes.plane[0] + whole / 2, rest / 2);
    memcpy(twos, planes.plane[1] + whole / 4, rest / 4);
    memcpy(tail, units + whole / 4, rest / 4);
    read_six_run(fours, twos, tail, numbers, to + whole);
}
#endif

// `count` codes of one row, whose units begin at `units`; `to` has 64 numbers to spare.
inline void read_super_row(const Plan& plan, const uint8_t* codes, const uint8_t* units, int64_t count, float* to) {
    const int64_t supers = count / plan.super_count;
    read_integers(plan.super_bits, codes, count, to);
    for (int64_t start = 0; start < supers; start += CHUNK) {
        const int64_t count = least(CHUNK, supers - start);
        float unit[CHUNK] = {};
        read_numbers(DType::float16, units + start * 2, count, unit);
        float* run = to + start * plan.super_count;
        if (plan.super_count == 8) {
            scale_supers<8>(run, unit, count * 8, plan.super_offset);
            continue;
        }
        if (plan.super_count == 16) {
            scale_supers<16>(run, unit, count * 16, plan.super_offset);
            continue;
        }
        for (int64_t s = 0; s < count; ++s) {
            float* block = run + s * plan.super_count;
            for (int g = 0; g < plan.super_count; ++g) block[g] = (block[g] - plan.super_offset) * unit[s];
        }
    }
}

// Call read(codes, units, count, to) for each row, or for all of them together where they are short.
template <class Read>
QUANTLIB_INLINE void for_super_rows(int bits, SuperRows from, int64_t rows, float* to, Read read) {
    if (from.joins(rows)) {
        uint8_t joined[SuperRows::MOST];
        join_rows(bits, from.codes, from.across, rows, joined);
        return read(joined, from.units, rows * from.across, to);
    }
    for (int64_t r = 0; r < rows; ++r, from.codes += from.row_bytes, from.units += from.unit_bytes, to += from.across) {
        read(from.codes, from.units, from.across, to);
    }
}

// `to` has 64 numbers to spare.
inline void read_super(const Plan& plan, const SuperRows& from, int64_t rows, float* to) {
#ifdef QUANTLIB_HAS_SIX
    if (plan.super_bits == 6 && plan.super_count == 8) {
        const SixNumbers numbers = six_numbers(plan.super_offset);
        return for_super_rows(6, from, rows, to, [&](const uint8_t* codes, const uint8_t* units, int64_t count, float* to) {
            read_six(planes_of(6, codes, count), units, count, numbers, to);
        });
    }
#endif
    for_super_rows(plan.super_bits, from, rows, to, [&](const uint8_t* codes, const uint8_t* units, int64_t count, float* to) {
        read_super_row(plan, codes, units, count, to);
    });
}

// Those of `rows` rows of blocks, one after another.
inline void read_scales(const Plan& plan, const Parts& parts, int64_t block_row, int64_t rows, float* to) {
    const int64_t count = plan.blocks_across * rows, first = block_row * plan.blocks_across;
    switch (plan.scale) {
        case ScaleKind::number:
            return read_numbers(plan.scale_dtype, parts.scales + first * item_size(plan.scale_dtype), count, to);
        case ScaleKind::e4m3_global:
            return read_e4m3(parts.scales + first, count, *parts.global_scale, to);
        case ScaleKind::e8m0:
            return read_e8m0(parts.scales + first, count, to);
        case ScaleKind::double_quant:
            return read_double_quant(plan, parts, first, count, to);
        case ScaleKind::super:
            return read_super(plan, {plan, parts.scales, parts.super_scales, block_row}, rows, to);
    }
}

inline void read_minima(const Plan& plan, const Parts& parts, int64_t block_row, int64_t rows, float* to) {
    if (plan.scale == ScaleKind::super) return read_super(plan, {plan, parts.minima, parts.super_minima, block_row}, rows, to);
    const int64_t first = block_row * plan.blocks_across;
    read_numbers(plan.scale_dtype, parts.minima + first * item_size(plan.scale_dtype), plan.blocks_across * rows, to);
}

inline void read_zeros(const Plan& plan, const Parts& parts, int64_t block_row, int64_t rows, float* to) {
    read_codes<8>(parts.zeros + block_row * plan.blocks_across, plan.blocks_across * rows, to);
}

// One number per block -> one per piece; pieces beyond the last block get 0.
inline void repeat_blocks(const Plan& plan, int piece, const float* blocks, float* pieces) {
    const int64_t wanted = pieces_of(plan, piece);
    const int64_t repeats = plan.block_cols == 0 ? wanted : plan.block_cols / piece;
    int64_t p = 0;
    for (int64_t g = 0; g < plan.blocks_across && p < wanted; ++g) {
        for (const int64_t stop = least(p + repeats, wanted); p < stop; ++p) pieces[p] = blocks[g];
    }
    for (; p < wanted; ++p) pieces[p] = 0.0f;
}

// Call expand(where pieces go, what reads the numbers of `rows` rows of blocks) for each kind of number that a format has.
template <class Expand>
inline void read_numbers_of(const Plan& plan, const Parts& parts, int64_t block_row, int64_t rows, const RowNumbers& numbers,
                            Expand expand) {
    expand(numbers.scale, [&](float* to) { read_scales(plan, parts, block_row, rows, to); });
    if (plan.has_zero) expand(numbers.zero, [&](float* to) { read_zeros(plan, parts, block_row, rows, to); });
    if (plan.has_minimum) expand(numbers.minimum, [&](float* to) { read_minima(plan, parts, block_row, rows, to); });
}

// Fill `numbers` for weight row `row`, one per `piece` columns.
inline void expand_row(const Plan& plan, const Parts& parts, int64_t row, const RowNumbers& numbers, int piece) {
    const int64_t block_row = plan.block_rows == 0 ? 0 : row / plan.block_rows;
    const auto expand = [&](float* pieces, auto read) {
        if (plan.block_cols == piece) {
            read(pieces);  // a block is a piece
            for (int64_t p = plan.blocks_across; p < pieces_of(plan, piece); ++p) pieces[p] = 0.0f;
        } else {
            read(numbers.blocks);
            repeat_blocks(plan, piece, numbers.blocks, pieces);
        }
    };
    read_numbers_of(plan, parts, block_row, 1, numbers, expand);
}

// Consecutive rows whose numbers are expanded together: for a short row a call per row takes as long as its products.
struct Run {
    int64_t rows, stride;  // as many as are expanded at once; floats between the numbers of one row and the next
    int64_t repeats;       // pieces of a block

    // A row by itself.
    Run() : rows(1), stride(0), repeats(0) {}
    // `columns` of a row are read; a run's rows lie side by side, so that what stands behind one row's is another's.
    Run(const Plan& plan, int64_t columns) : Run() {
        const int piece = plan.span_piece;
        repeats = plan.block_cols == 0 ? (columns + piece - 1) / piece : plan.block_cols / piece;
        const int64_t pieces = repeats * plan.blocks_across;
        if (plan.block_rows != 1 || pieces == 0 || pieces * piece < columns) return;
        const bool wide = plan.scale == ScaleKind::number && plan.scale_dtype == DType::float32;  // twice the bytes of others
        rows = most(1, least(MOST_ROWS, MOST_PIECES / (wide ? 2 : 1) / pieces));
        stride = pieces;
    }
    // With 64 to spare, as row_capacity.
    int64_t capacity(const Plan& plan) const { return most(row_capacity(plan), round_up(rows * stride, CHUNK) + 64); }

    static constexpr int64_t MOST_ROWS = 16, MOST_PIECES = 256;  // memory is idle for as long
};

// Ask for what the numbers of `rows` rows from `row` on will be made of, where each row has its own.
// A function by itself: tests/test_cpu_machine_code.py sees that it is called and asks.
__attribute__((noinline)) inline void fetch_rows(const Plan& plan, const Parts& parts, int64_t row, int64_t rows) {
    const auto fetch_blocks = [&](const uint8_t* from, int64_t row_bytes) {
        for (int64_t byte = 0; byte < rows * row_bytes; byte += 64) fetch_near(from + row * row_bytes + byte);
    };
    const int64_t across = plan.blocks_across;
    const bool super = plan.scale == ScaleKind::super;
    const int64_t bits = super ? plan.super_bits : plan.scale == ScaleKind::number ? 8 * item_size(plan.scale_dtype) : 8;
    const int64_t row_bytes = (across * bits + 7) / 8, unit_bytes = plan.supers_across * 2;
    fetch_blocks(parts.scales, row_bytes);
    if (super) fetch_blocks(parts.super_scales, unit_bytes);
    if (plan.has_zero) fetch_blocks(parts.zeros, across);
    if (plan.has_minimum) fetch_blocks(parts.minima, row_bytes);
    if (plan.has_minimum && super) fetch_blocks(parts.super_minima, unit_bytes);
}

// Fill `numbers` for `rows` rows from `row` on, of which a Run allows so many.
inline void expand_run(const Plan& plan, const Parts& parts, int64_t row, int64_t rows, const Run& run, const RowNumbers& numbers) {
    if (run.rows == 1) {
        expand_row(plan, parts, row, numbers, plan.span_piece);
        if (plan.block_rows == 1) fetch_rows(plan, parts, row + 1, 1);
        return;
    }
    const auto expand = [&](float* pieces, auto read) {
        if (run.repeats == 1) return read(pieces);
        read(numbers.blocks);
        const int64_t blocks = rows * plan.blocks_across;
        for (int64_t g = 0; g < blocks; ++g, pieces += run.repeats) {
            for (int64_t p = 0; p < run.repeats; ++p) pieces[p] = numbers.blocks[g];
        }
    };
    read_numbers_of(plan, parts, row, rows, numbers, expand);
    fetch_rows(plan, parts, row + rows, rows);
}

// The numbers of rows that are decoded together, run by run.
class BlockNumbers {
  public:
    // Of up to `rows` rows, of which `columns` columns are read.
    BlockNumbers(const Plan& plan, int64_t columns, int64_t rows)
        : plan_(&plan), run_(plan, columns), stride_(run_.rows == 1 ? row_capacity(plan) : run_.stride),
          capacity_(rows * stride_ + run_.capacity(plan)) {}
    int64_t floats() const { return (1 + plan_->has_zero + plan_->has_minimum) * capacity_ + run_.capacity(*plan_); }

    // The same in memory of that size.
    BlockNumbers in(float* memory) const {
        BlockNumbers placed = *this;
        float* zero = memory + capacity_;
        float* minimum = zero + plan_->has_zero * capacity_;
        placed.first_ = {memory, zero, minimum, minimum + plan_->has_minimum * capacity_};
        return placed;
    }
    void expand(const Parts& parts, int64_t row, int64_t rows) const {
        for (int64_t r = 0; r < rows; r += run_.rows) {
            expand_run(*plan_, parts, row + r, least(run_.rows, rows - r), run_, of(r));
        }
    }
    // Of row r of those that were expanded, from piece `piece` on; and of the row after.
    RowNumbers of(int64_t r, int64_t piece = 0) const {
        const int64_t at = r * stride_ + piece;
        return {first_.scale + at, first_.zero + at, first_.minimum + at, first_.blocks};
    }
    RowNumbers next(const RowNumbers& row) const {
        return {row.scale + stride_, row.zero + stride_, row.minimum + stride_, row.blocks};
    }

  private:
    const Plan* plan_;
    Run run_;
    int64_t stride_, capacity_;
    RowNumbers first_ = {};
};

}  // namespace quantlib::cpu::QUANTLIB_ISA

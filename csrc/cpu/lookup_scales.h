// A weight row's numbers for the look-up kernels: as expand_row leaves them, but K-quants' 6-bit scales and minima come 64 at a
// time, which otherwise cost as much as the row's products.
#pragma once

#include "lookup_decode.h"

#ifdef QUANTLIB_HAS_LOOKUP
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int SUPER_RUN = 64;  // codes that are read together
constexpr int SUPER_BITS = 6, SUPER_COUNT = LANES;

// Whether every eight blocks share a unit.
inline bool has_super_runs(const Plan& plan) {
    return plan.scale == ScaleKind::super && plan.super_bits == SUPER_BITS && plan.super_count == SUPER_COUNT &&
           plan.block_rows == 1 && plan.block_cols == plan.span_piece;
}

// to[i] = (code - super_offset) * its unit, for the codes of one run.
inline void read_super_run(const Planes& planes, int64_t run, const uint8_t* units, Floats offset, float* to) {
    const ByteCodes found = byte_codes<SUPER_BITS>(planes, run, 0);
    const Ints first = low_words(found.even, found.odd), last = high_words(found.even, found.odd);
    const __m128i quarters[4] = {_mm256_castsi256_si128(first), _mm256_castsi256_si128(last), _mm256_extracti128_si256(first, 1),
                                 _mm256_extracti128_si256(last, 1)};
    float own[SUPER_RUN / SUPER_COUNT];
    store(own, load_half(reinterpret_cast<const uint16_t*>(units)));
    for (int q = 0; q < 4; ++q, to += 2 * LANES) {
        const Floats low = number(_mm256_cvtepu8_epi32(quarters[q]));
        const Floats high = number(_mm256_cvtepu8_epi32(_mm_srli_si128(quarters[q], LANES)));
        store(to, multiply(subtract(low, offset), broadcast(own[2 * q])));
        store(to + LANES, multiply(subtract(high, offset), broadcast(own[2 * q + 1])));
    }
}

// The same for `count` codes, a multiple of eight; `to` has room for whole runs, and behind the last code gets what means nothing.
inline void read_super_runs(const Planes& planes, const uint8_t* units, int64_t count, Floats offset, float* to) {
    const int64_t whole = count / SUPER_RUN, rest = count % SUPER_RUN;
    for (int64_t run = 0; run < whole; ++run, units += SUPER_RUN / SUPER_COUNT * 2) {
        read_super_run(planes, run, units, offset, to + run * SUPER_RUN);
    }
    if (rest == 0) return;
    // From a copy, so that no byte beyond the codes is read.
    uint8_t tail[2][SUPER_RUN] = {}, tail_units[SUPER_RUN / SUPER_COUNT * 2] = {};
    for (int i = 0; i < 2; ++i) {
        const int width = PLANE_WIDTHS[SUPER_BITS][i];
        memcpy(tail[i], planes.plane[i] + whole * (SUPER_RUN * width / 8), rest * width / 8);
    }
    memcpy(tail_units, units, rest / SUPER_COUNT * 2);
    read_super_run({{tail[0], tail[1], nullptr}}, 0, tail_units, offset, to + whole * SUPER_RUN);
}

// The same for `rows` rows of blocks from `row` on, one after another. The planes of rows shorter than a run are moved together
// first: most of each run would be empty.
inline void read_super_rows(const Plan& plan, const uint8_t* codes, const uint8_t* units, int64_t row, int64_t rows, float* to) {
    const int64_t across = plan.blocks_across, supers = across / SUPER_COUNT, row_bytes = across * SUPER_BITS / 8;
    const Floats offset = broadcast(plan.super_offset);
    codes += row * row_bytes, units += row * supers * 2;
    if (across >= SUPER_RUN || rows == 1) {
        for (int64_t r = 0; r < rows; ++r) {
            const Planes planes = planes_of(SUPER_BITS, codes + r * row_bytes, across);
            read_super_runs(planes, units + r * supers * 2, across, offset, to + r * across);
        }
        return;
    }
    uint8_t joined[Run::MOST_ROWS * SUPER_RUN * SUPER_BITS / 8];
    join_rows(SUPER_BITS, codes, across, rows, joined);
    read_super_runs(planes_of(SUPER_BITS, joined, rows * across), units, rows * across, offset, to);
}

// Fill `numbers` for `rows` rows from `row` on, in units of the decoder.
inline void expand_lookup(const Plan& plan, const Parts& parts, int64_t row, int64_t rows, const Run& run, float unit,
                          const RowNumbers& numbers) {
    if (has_super_runs(plan)) {
        read_super_rows(plan, parts.scales, parts.super_scales, row, rows, numbers.scale);
        if (plan.has_minimum) read_super_rows(plan, parts.minima, parts.super_minima, row, rows, numbers.minimum);
        if (rows > 1) fetch_rows(plan, parts, row + rows, rows);
    } else {
        expand_run(plan, parts, row, rows, run, numbers);
    }
    if (unit == 1) return;
    const Floats up = broadcast(unit), down = broadcast(1 / unit);
    const int64_t count = run.rows == 1 ? pieces_of(plan, plan.span_piece) : rows * run.stride;
    for (int64_t i = 0; i < count; i += LANES) {
        store(numbers.scale + i, multiply(load(numbers.scale + i), up));
        if (plan.has_zero) store(numbers.zero + i, multiply(load(numbers.zero + i), down));
    }
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

// A weight row's numbers for the look-up kernels: as expand_run leaves them, in units of the decoder.
#pragma once

#include "lookup_decode.h"

#ifdef QUANTLIB_HAS_LOOKUP
namespace quantlib::cpu::QUANTLIB_ISA {

// Fill `numbers` for `rows` rows from `row` on, in units of the decoder.
inline void expand_lookup(const Plan& plan, const Parts& parts, int64_t row, int64_t rows, const Run& run, float unit,
                          const RowNumbers& numbers) {
    expand_run(plan, parts, row, rows, run, numbers);
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

// x -> int8 with a scale per row: quantlib/formats/base.py for `int8`, bit by bit.
//
//     scale = fp16(largest magnitude / 127.5), towards zero     code = 128 + round(x / scale), ties to even; 128 where the scale is 0
//
// A row with a number that isn't finite gets the scale NaN, one whose scale is beyond fp16 infinity, which makes NaN of products.
#pragma once

#include "convert.h"
#include "rows.h"

namespace quantlib::cpu::QUANTLIB_ISA {

// The greatest fp16 number that isn't above a positive one; the least one for what is smaller still, zero for what rounds to it.
inline float half_below(float exact) {
    uint16_t half;
    float stored;
    write_numbers(DType::float16, &exact, 1, &half);
    read_numbers(DType::float16, &half, 1, &stored);
    if (!(stored > exact) || half <= 1 || half == 0x7C00) return stored;
    half -= 1;
    read_numbers(DType::float16, &half, 1, &stored);
    return stored;
}

// One row, `numbers` [k rounded up to whole vectors] with zeros behind column k, which become what their codes stand for; returns
// the scale.
inline float int8_row(float* numbers, int64_t k, uint8_t* codes) {
    Floats most_yet = zero(), finite = zero();  // sums of x * 0: NaN where any x is no finite number
    for (int64_t i = 0; i < k; i += LANES) {
        const Floats x = load(numbers + i);
        most_yet = maximum(most_yet, maximum(x, subtract(zero(), x)));
        finite = multiply_add(x, zero(), finite);
    }
    const float scale = sum(finite) == 0.0f ? half_below(greatest_lane(most_yet) / 127.5f) : __builtin_nanf("");
    const bool divides = scale > 0.0f;
    const Floats factor = broadcast(divides ? scale : 1.0f), offset = broadcast(128.0f), top = broadcast(255.0f);
    for (int64_t i = 0; i < k; i += LANES) {
        const Floats x = divides ? divide(load(numbers + i), factor) : zero();
        const Floats code = minimum(top, maximum(zero(), add(round_even(x), offset)));
        uint8_t run[LANES];
        store_bytes(run, integer(code));
        if (codes != nullptr) memcpy(codes + i, run, least(LANES, k - i));
        store(numbers + i, multiply(subtract(code, offset), broadcast(scale)));
    }
    return scale;
}

inline bool rows_to_int8(const Int8RowsCall& call) {
    const int threads = useful_threads(call.m * call.k, call.threads);
    const int64_t floats = round_up(call.k, LANES) + LANES;
    const Scratch scratch(threads * floats);
    if (scratch.floats == nullptr) return false;
    const int64_t size = item_size(call.dtype);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        float* numbers = scratch.floats + part * floats;
        for (int64_t m = call.m * part / threads; m < call.m * (part + 1) / threads; ++m) {
            const uint8_t* from = static_cast<const uint8_t*>(call.x) + m * call.x_row_stride * size;
            memset(numbers + call.k, 0, (floats - call.k) * sizeof(float));
            read_strided(call.dtype, from, call.x_column_stride, call.k, numbers);
            const float scale = int8_row(numbers, call.k, call.codes == nullptr ? nullptr : call.codes + m * call.k);
            if (call.scales != nullptr) call.scales[m] = scale;
            if (call.rounded == nullptr) continue;
            write_numbers(call.dtype, numbers, call.k, static_cast<uint8_t*>(call.rounded) + m * call.k * size);
        }
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

// The least and the greatest weight of every block of every row, in one pass. A zero may have either sign.
#pragma once

#include "convert.h"
#include "quantize_types.h"
#include "rows.h"

namespace quantlib::cpu::QUANTLIB_ISA {

struct Extremes {
    Floats low, high;
    Floats finite;  // sums of x * 0: NaN where any x is no finite number

    inline void take(Floats x) {
        low = minimum(low, x);
        high = maximum(high, x);
        finite = multiply_add(x, zero(), finite);
    }
};

template <DType D>
inline void take_run(const uint8_t* from, int64_t count, Extremes& found) {
    constexpr int SIZE = D == DType::float32 ? 4 : 2;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) found.take(load_as<D>(from + i * SIZE));
    if (i == count) return;
    // The last vector, filled up with its own first number.
    uint8_t stored[LANES * SIZE];
    for (int lane = 0; lane < LANES; ++lane) {
        memcpy(stored + lane * SIZE, from + (i + lane < count ? i + lane : i) * SIZE, SIZE);
    }
    found.take(load_as<D>(stored));
}

// False where a weight of the row is no finite number.
template <DType D>
bool row_extremes(const Coding& coding, const uint8_t* row, float* low, float* high) {
    constexpr int SIZE = D == DType::float32 ? 4 : 2;
    const int64_t width = coding.block_cols == 0 ? coding.padded_k : coding.block_cols;
    Floats finite = zero();
    for (int64_t g = 0; g < coding.blocks_across; ++g) {
        const int64_t start = g * width, count = most(0, least(width, coding.k - start));
        // Padding is zero.
        const Floats least_yet = broadcast(count < width ? 0.0f : __builtin_huge_valf());
        Extremes found = {least_yet, subtract(zero(), least_yet), finite};
        take_run<D>(row + start * SIZE, count, found);
        low[g] = least_lane(found.low);
        high[g] = greatest_lane(found.high);
        finite = found.finite;
    }
    return sum(finite) == 0.0f;
}

inline bool row_extremes(const Coding& coding, const Weight& weight, int64_t row, float* low, float* high) {
    const uint8_t* from = static_cast<const uint8_t*>(weight.data) + row * weight.row_stride * item_size(weight.dtype);
    if (weight.dtype == DType::float32) return row_extremes<DType::float32>(coding, from, low, high);
    if (weight.dtype == DType::float16) return row_extremes<DType::float16>(coding, from, low, high);
    return row_extremes<DType::bfloat16>(coding, from, low, high);
}

inline Outcome extremes(const ExtremesCall& call) {
    const Coding& coding = *call.coding;
    const int64_t rows = call.weight.rows, across = coding.blocks_across;
    const int threads = useful_threads(rows * coding.k, call.threads);
    bool finite = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : finite)
    for (int part = 0; part < threads; ++part) {
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads; ++i) {
            finite = row_extremes(coding, call.weight, i, call.low + i * across, call.high + i * across) && finite;
        }
    }
    return finite ? Outcome::done : Outcome::not_finite;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

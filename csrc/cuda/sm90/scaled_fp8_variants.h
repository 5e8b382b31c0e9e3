// The instances of scaled_fp8: what each is for, and how it is launched. Host code only.
#pragma once

#include <string>
#include <vector>

#include "../common/weight.h"

namespace quantlib::cuda {

// An operand [rows, columns] in global memory: codes at multiples of 16 bytes, rows `columns` bytes apart, a multiple of 16.
struct Fp8Operand {
    const std::byte* codes;
    int columns;
    const float* scales;  // [turns, pitch] or [1, pitch], at a multiple of 16 bytes: a number per row, or per 128 rows
    int64_t pitch;        // in numbers, a multiple of 4
    bool stepped;         // a row of scales for each turn of 128 columns, or one for all
};

struct ScaledFp8Problem {
    Fp8Operand x, w;
    std::byte* y;
    const std::byte* bias;
    std::string result;  // the dtype of y and bias: float16, bfloat16, float32
    int m, n, k;
    Schedule schedule;
};

// scaling: "block" or "row", of W; x has a scale per row.
struct ScaledFp8Variant {
    std::string scaling;
    int rows, columns;  // of x and of W in a block
    int depth;          // columns of a turn
    int threads, shared_bytes;
    void (*launch)(const ScaledFp8Problem&, int programs, void* stream);
};

std::vector<ScaledFp8Variant> all_scaled_fp8_variants();

}  // namespace quantlib::cuda

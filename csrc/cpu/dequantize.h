// Packed rows -> W[row_start:row_stop] in fp32, bf16 or fp16: the law in fp32, rounded once. fp32 goes straight to its place, except
// for a last chunk that is not whole.
#pragma once

#include "rows.h"

namespace quantlib::cpu::QUANTLIB_ISA {

inline bool dequantize(const DequantizeCall& call) {
    const Plan& plan = *call.plan;
    const int64_t rows = call.row_stop - call.row_start;
    if (rows == 0 || plan.k == 0) return true;
    const int64_t columns = round_up(plan.k, CHUNK), row_bytes = plan.k * item_size(call.dtype);
    const int threads = useful_threads(rows * columns, call.threads);
    const int64_t thread_floats = round_up(numbers_size(plan) + columns, LANES);
    const Scratch scratch(threads * thread_floats);
    if (scratch.floats == nullptr) return false;

    const DecodeLoop<StoreSink> loop = pick_loop<StoreSink>(plan);
    uint8_t* out = static_cast<uint8_t*>(call.out);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        float* memory = scratch.floats + part * thread_floats;
        const RowNumbers numbers = carve_numbers(plan, memory);
        float* decoded = memory + numbers_size(plan);
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads; ++i) {
            expand_row(plan, call.parts, call.row_start + i, numbers);
            const Row weights(plan, call.parts, call.row_start + i, numbers);
            uint8_t* to = out + i * row_bytes;
            const int64_t direct = call.dtype == DType::float32 ? plan.k / CHUNK : 0;
            StoreSink straight{reinterpret_cast<float*>(to)}, sink{decoded};
            weights.decode(loop, 0, direct, straight);
            weights.decode(loop, direct, columns / CHUNK, sink);
            write_numbers(call.dtype, decoded, plan.k - direct * CHUNK, to + direct * CHUNK * sizeof(float));
        }
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

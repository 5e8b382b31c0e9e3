// Packed rows -> a rectangle of W in fp32, bf16 or fp16: the law in fp32, rounded once. fp32 goes straight to its place,
// except for a last chunk that is not whole.
#pragma once

#include "strips.h"

namespace quantlib::cpu::QUANTLIB_ISA {

inline bool dequantize(const DequantizeCall& call) {
    const Plan& plan = *call.plan;
    const int64_t rows = call.row_stop - call.row_start;
    const int64_t width = call.column_stop - call.column_start;
    if (rows == 0 || width == 0) return true;
    const int64_t row_bytes = width * item_size(call.dtype);
    const int64_t first = call.column_start / CHUNK, last = round_up(call.column_stop, CHUNK) / CHUNK;
    const int64_t direct = call.dtype == DType::float32 ? width / CHUNK : 0;  // chunks that need no scratch
    const int threads = useful_threads(rows * width, call.threads);
    const int64_t decoded_floats = round_up(numbers_size(plan) + (last - first) * CHUNK, LANES);
    const int64_t thread_floats = decoded_floats + PartRows::floats(plan);
    const Scratch scratch(threads * thread_floats);
    if (scratch.floats == nullptr) return false;

    const DecodeLoop<StoreSink> loop = pick_loop<StoreSink>(plan);
    uint8_t* out = static_cast<uint8_t*>(call.out);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        float* memory = scratch.floats + part * thread_floats;
        const RowNumbers numbers = carve_numbers(plan, memory);
        float* decoded = memory + numbers_size(plan);
        PartRows whole(plan, memory + decoded_floats);
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads; ++i) {
            const Parts& parts = whole.of(call.parts, call.row_start + i);
            expand_row(plan, parts, call.row_start + i, numbers, plan.piece);
            const Row weights(plan, parts, call.row_start + i, numbers);
            uint8_t* to = out + i * row_bytes;
            StoreSink straight{reinterpret_cast<float*>(to)}, sink{decoded};
            weights.decode(loop, first, first + direct, straight);
            weights.decode(loop, first + direct, last, sink);
            write_numbers(call.dtype, decoded, width - direct * CHUNK, to + direct * CHUNK * sizeof(float));
        }
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

// Runs of numbers between their stored dtype and fp32. Storing rounds to nearest, ties to even.
#pragma once

#include "simd.h"

namespace quantlib::cpu::QUANTLIB_ISA {

inline int64_t item_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

template <DType D>
inline Floats load_as(const void* from) {
    if constexpr (D == DType::float32) return load(static_cast<const float*>(from));
    if constexpr (D == DType::float16) return load_half(static_cast<const uint16_t*>(from));
    if constexpr (D == DType::bfloat16) return load_bfloat(static_cast<const uint16_t*>(from));
}

template <DType D>
inline void store_as(void* to, Floats a) {
    if constexpr (D == DType::float32) store(static_cast<float*>(to), a);
    if constexpr (D == DType::float16) store_half(static_cast<uint16_t*>(to), a);
    if constexpr (D == DType::bfloat16) store_bfloat(static_cast<uint16_t*>(to), a);
}

template <DType D>
inline void read_run(const uint8_t* from, int64_t count, float* to) {
    constexpr int SIZE = D == DType::float32 ? 4 : 2;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load_as<D>(from + i * SIZE));
    if (i < count) {
        uint8_t stored[LANES * SIZE] = {};
        float values[LANES];
        memcpy(stored, from + i * SIZE, (count - i) * SIZE);
        store(values, load_as<D>(stored));
        memcpy(to + i, values, (count - i) * sizeof(float));
    }
}

template <DType D>
inline void write_run(const float* from, int64_t count, uint8_t* to) {
    constexpr int SIZE = D == DType::float32 ? 4 : 2;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store_as<D>(to + i * SIZE, load(from + i));
    if (i < count) {
        uint8_t stored[LANES * SIZE];
        float values[LANES] = {};
        memcpy(values, from + i, (count - i) * sizeof(float));
        store_as<D>(stored, load(values));
        memcpy(to + i * SIZE, stored, (count - i) * SIZE);
    }
}

// `count` contiguous numbers of a dtype -> fp32.
inline void read_numbers(DType dtype, const void* from, int64_t count, float* to) {
    const uint8_t* bytes = static_cast<const uint8_t*>(from);
    if (dtype == DType::float32) return read_run<DType::float32>(bytes, count, to);
    if (dtype == DType::float16) return read_run<DType::float16>(bytes, count, to);
    read_run<DType::bfloat16>(bytes, count, to);
}

// fp32 -> `count` contiguous numbers of a dtype.
inline void write_numbers(DType dtype, const float* from, int64_t count, void* to) {
    uint8_t* bytes = static_cast<uint8_t*>(to);
    if (dtype == DType::float32) return write_run<DType::float32>(from, count, bytes);
    if (dtype == DType::float16) return write_run<DType::float16>(from, count, bytes);
    write_run<DType::bfloat16>(from, count, bytes);
}

// `count` numbers that lie `stride` elements apart (of any sign) -> fp32.
inline void read_strided(DType dtype, const void* from, int64_t stride, int64_t count, float* to) {
    if (stride == 1) return read_numbers(dtype, from, count, to);
    const int64_t size = item_size(dtype);
    const uint8_t* bytes = static_cast<const uint8_t*>(from);
    uint8_t run[CHUNK * 4];
    for (int64_t start = 0; start < count; start += CHUNK) {
        const int64_t length = least(CHUNK, count - start);
        for (int64_t i = 0; i < length; ++i) memcpy(run + i * size, bytes + (start + i) * stride * size, size);
        read_numbers(dtype, run, length, to + start);
    }
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

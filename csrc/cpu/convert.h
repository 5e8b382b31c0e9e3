// Runs of numbers between their stored dtype and fp32. Storing rounds to nearest, ties to even.
#pragma once

#include "simd.h"

namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int64_t item_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

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

// A vector of numbers in memory; and one of which only the first `count` are there, zeros behind them.
struct WholeVector {
    template <DType D>
    static QUANTLIB_INLINE Floats load(const void* from) { return load_as<D>(from); }
    template <DType D>
    static QUANTLIB_INLINE void store(void* to, Floats a) { store_as<D>(to, a); }
};
struct PartVector {
    int64_t count;
    template <DType D>
    inline Floats load(const void* from) const {
        uint8_t stored[LANES * 4] = {};
        memcpy(stored, from, count * item_size(D));
        return load_as<D>(stored);
    }
    template <DType D>
    inline void store(void* to, Floats a) const {
        uint8_t stored[LANES * 4];
        store_as<D>(stored, a);
        memcpy(to, stored, count * item_size(D));
    }
};
// Call with(one of these, its first number) for `count` numbers.
template <class With>
QUANTLIB_INLINE void for_vectors(int64_t count, With with) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) with(WholeVector(), i);
    if (i < count) with(PartVector{count - i}, i);
}

// Numbers as they are after one trip through the dtype.
template <DType D>
inline Floats round_as(Floats a) {
    if constexpr (D == DType::float16) return round_half(a);
    if constexpr (D == DType::bfloat16) return round_bfloat(a);
    return a;
}

// Call `with` a dtype as a type.
template <DType D>
struct Typed {
    static constexpr DType dtype = D;
};
template <class With>
inline void with_dtype(DType dtype, With with) {
    switch (dtype) {
        case DType::float32: return with(Typed<DType::float32>());
        case DType::bfloat16: return with(Typed<DType::bfloat16>());
        case DType::float16: return with(Typed<DType::float16>());
    }
}

template <DType D>
inline void read_run(const uint8_t* from, int64_t count, float* to) {
    for_vectors(count, [&](auto vector, int64_t i) QUANTLIB_LAMBDA {
        vector.template store<DType::float32>(to + i, vector.template load<D>(from + i * item_size(D)));
    });
}

template <DType D>
inline void write_run(const float* from, int64_t count, uint8_t* to) {
    for_vectors(count, [&](auto vector, int64_t i) QUANTLIB_LAMBDA {
        vector.template store<D>(to + i * item_size(D), vector.template load<DType::float32>(from + i));
    });
}

// `count` contiguous numbers of a dtype -> fp32.
inline void read_numbers(DType dtype, const void* from, int64_t count, float* to) {
    const uint8_t* bytes = static_cast<const uint8_t*>(from);
    with_dtype(dtype, [&](auto typed) { read_run<decltype(typed)::dtype>(bytes, count, to); });
}

// fp32 -> `count` contiguous numbers of a dtype.
inline void write_numbers(DType dtype, const float* from, int64_t count, void* to) {
    uint8_t* bytes = static_cast<uint8_t*>(to);
    with_dtype(dtype, [&](auto typed) { write_run<decltype(typed)::dtype>(from, count, bytes); });
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

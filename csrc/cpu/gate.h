// Numbers of the small steps between products, and silu(gate) * up, which ends a step of two products.
#pragma once

#include "convert.h"
#include "decoding_types.h"

namespace quantlib::cpu::QUANTLIB_ISA {

inline const uint8_t* at(const void* from, DType dtype, int64_t element) {
    return static_cast<const uint8_t*>(from) + element * item_size(dtype);
}
inline uint8_t* at(void* to, DType dtype, int64_t element) { return static_cast<uint8_t*>(to) + element * item_size(dtype); }

// `count` numbers as they are after one trip through the dtype.
inline void round_numbers(DType dtype, float* numbers, int64_t count) {
    if (dtype == DType::float32) return;
    uint8_t stored[CHUNK * 2];
    for (int64_t start = 0; start < count; start += CHUNK) {
        const int64_t length = least(CHUNK, count - start);
        write_numbers(dtype, numbers + start, length, stored);
        read_numbers(dtype, stored, length, numbers + start);
    }
}

// e^a, within 2 units in the last place; 0 below -87, which is all that a softmax and a sigmoid ask for.
inline Floats exponential(Floats a) {
    const Floats low = broadcast(-87.0f);
    const Floats inside = minimum(maximum(a, low), broadcast(88.0f));
    const Floats power = round_even(multiply(inside, broadcast(1.44269504f)));
    Floats rest = multiply_add(power, broadcast(-0.693359375f), inside);
    rest = multiply_add(power, broadcast(2.12194440e-4f), rest);
    constexpr float FACTORS[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    Floats series = zero();
    for (float factor : FACTORS) series = multiply_add(series, rest, broadcast(factor));
    const Floats scaled = as_floats(add(as_ints(series), shift_left<23>(integer(power))));
    return pick(less(a, low), zero(), scaled);
}

// x as whole vectors of fp32, zeros behind `count`.
inline void read_padded(DType dtype, const void* x, int64_t count, float* to) {
    memset(to + count, 0, (round_up(count, CHUNK) - count) * sizeof(float));
    read_numbers(dtype, x, count, to);
}

// y = what `combine` leaves in the first of two inputs, CHUNK numbers at a time.
template <class Combine>
inline void combine_chunks(DType dtype, const void* a, const void* b, void* y, int64_t count, Combine combine) {
    float first[CHUNK], second[CHUNK];
    for (int64_t start = 0; start < count; start += CHUNK) {
        const int64_t length = least(CHUNK, count - start);
        read_padded(dtype, at(a, dtype, start), length, first);
        read_padded(dtype, at(b, dtype, start), length, second);
        combine(first, second);
        write_numbers(dtype, first, length, at(y, dtype, start));
    }
}

inline bool gate(const GateCall& call) {
    combine_chunks(call.dtype, call.gate, call.up, call.y, call.count, [&](float* gates, const float* ups) {
        for (int i = 0; i < CHUNK; i += LANES) {
            const Floats x = load(gates + i), below = add(broadcast(1.0f), exponential(subtract(zero(), x)));
            store(gates + i, divide(x, below));
        }
        round_numbers(call.dtype, gates, CHUNK);
        for (int i = 0; i < CHUNK; i += LANES) store(gates + i, multiply(load(gates + i), load(ups + i)));
    });
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

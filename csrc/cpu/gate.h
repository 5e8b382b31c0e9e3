// Numbers of the small steps between products, and silu(gate) * up, which ends a step of two products.
#pragma once

#include "convert.h"
#include "decoding_types.h"

namespace quantlib::cpu::QUANTLIB_ISA {

inline const uint8_t* at(const void* from, DType dtype, int64_t element) {
    return static_cast<const uint8_t*>(from) + element * item_size(dtype);
}
inline uint8_t* at(void* to, DType dtype, int64_t element) { return static_cast<uint8_t*>(to) + element * item_size(dtype); }

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

// y = combine(a, b) for `count` numbers, vector by vector.
template <DType D, class Combine>
inline void combine_vectors(const void* a, const void* b, void* y, int64_t count, Combine combine) {
    for_vectors(count, [&](auto vector, int64_t i) QUANTLIB_LAMBDA {
        const Floats first = vector.template load<D>(at(a, D, i)), second = vector.template load<D>(at(b, D, i));
        vector.template store<D>(at(y, D, i), combine(first, second));
    });
}

inline bool gate(const GateCall& call) {
    with_dtype(call.dtype, [&](auto typed) {
        constexpr DType D = decltype(typed)::dtype;
        combine_vectors<D>(call.gate, call.up, call.y, call.count, [](Floats x, Floats up) QUANTLIB_LAMBDA {
            const Floats below = add(broadcast(1.0f), exponential(subtract(zero(), x)));
            return multiply(round_as<D>(divide(x, below)), up);
        });
    });
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

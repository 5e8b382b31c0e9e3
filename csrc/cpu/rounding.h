// From numbers in the codec's own domain (weights divided by their scale) to the nearest code, and to the nearest code's value:
// quantlib/formats/codecs.py, bit by bit. NaN gives NaN values, or the lowest of a table.
#pragma once

#include "quantize_types.h"
#include "simd.h"

namespace quantlib::cpu::QUANTLIB_ISA {

struct AffineRounding {
    Floats offset, top, low, high;
    explicit AffineRounding(const Coding& c)
        : offset(broadcast(c.offset)),
          top(broadcast(float((1 << c.bits) - 1))),
          low(broadcast(-c.offset)),
          high(broadcast(float((1 << c.bits) - 1) - c.offset)) {}

    inline Floats value(Floats x) const { return minimum(high, maximum(low, round_even(x))); }
    inline Ints code(Floats x) const { return integer(minimum(top, maximum(zero(), add(round_even(x), offset)))); }
};

// A code book of up to 16 values. A tie takes the lower value.
struct TableRounding {
    Ladder bounds;
    Book ranked, order;
    explicit TableRounding(const Coding& c)
        : bounds(ladder(c.bounds)), ranked(book(c.ranked)), order(book(reinterpret_cast<const float*>(c.order))) {}

    inline Floats value(Floats x) const { return look_up<4>(ranked, rank(bounds, x)); }
    inline Ints code(Floats x) const { return as_ints(look_up<4>(order, rank(bounds, x))); }
};

// The step between neighbours is a power of two that x's own exponent gives; rounding half to even on a multiple of the step is
// rounding to the even code. That multiple plus 2^mantissa_bits per binade above the lowest is the code.
struct MinifloatRounding {
    Floats smallest, largest, steps, step;
    Floats plus_zero;  // x plus this keeps the sign of -0.0, or drops it
    int bits, mantissa_bits;
    explicit MinifloatRounding(const Coding& c)
        : smallest(broadcast(c.smallest)),
          largest(broadcast(c.largest)),
          steps(broadcast(float(1 << c.mantissa_bits))),
          step(broadcast(1.0f / float(1 << c.mantissa_bits))),
          plus_zero(broadcast(c.signed_zero ? -0.0f : 0.0f)),
          bits(c.bits),
          mantissa_bits(c.mantissa_bits) {}

    struct Rounded {
        Floats multiple, binade;
    };
    inline Rounded round(Floats x) const {
        const Floats magnitude = minimum(largest, as_floats(both(as_ints(x), broadcast_int(0x7FFFFFFF))));
        const Floats binade = maximum(smallest, as_floats(both(as_ints(magnitude), broadcast_int(0x7F800000))));
        const Floats inverse = as_floats(subtract(broadcast_int(0x7F000000), as_ints(binade)));
        return {round_even(multiply(magnitude, multiply(inverse, steps))), binade};
    }
    static inline Ints sign(Floats x) { return both(as_ints(x), broadcast_int(int32_t(0x80000000u))); }

    inline Floats value(Floats x) const {
        const Rounded r = round(x);
        return as_floats(either(as_ints(multiply(r.multiple, multiply(r.binade, step))), sign(x)));
    }
    inline Ints code(Floats x) const {
        const Rounded r = round(x);
        const Ints binades = shift_right(subtract(as_ints(r.binade), as_ints(smallest)), 23 - mantissa_bits);
        return either(add(integer(r.multiple), binades), shift_right(sign(add(x, plus_zero)), 32 - bits));
    }
};

// A scale to what its kind can hold, as quantlib/formats/scales.py's `round` does.
class ScaleRounding {
  public:
    ScaleRounding(const Coding& coding, float global_scale)
        : kind_(coding.scale), dtype_(coding.scale_dtype), global_(broadcast(global_scale)), e4m3_(e4m3(coding)) {}

    inline Floats operator()(Floats scale) const {
        switch (kind_) {
            case ScaleKind::number: return number(scale);
            case ScaleKind::e4m3_global:
                return multiply(e4m3_.value(maximum(broadcast(0x1p-9f), divide(scale, global_))), global_);
            case ScaleKind::e8m0: return power_of_two(scale);
            default: return scale;
        }
    }

  private:
    ScaleKind kind_;
    DType dtype_;
    Floats global_;
    MinifloatRounding e4m3_;

    static inline MinifloatRounding e4m3(Coding coding) {
        coding.bits = 8, coding.mantissa_bits = 3, coding.smallest = 0x1p-6f, coding.largest = 448.0f;
        return MinifloatRounding(coding);
    }

    inline Floats number(Floats scale) const {
        uint16_t stored[LANES];
        if (dtype_ == DType::float32) return scale;
        if (dtype_ == DType::float16) {
            store_half(stored, scale);
            return load_half(stored);
        }
        store_bfloat(stored, scale);
        return load_bfloat(stored);
    }

    // The exponent grows by one where the mantissa lies above the root of two: 1.f > sqrt(2) is f > 0x3504F3, and half of that
    // for the one binade below the normal numbers.
    static inline Floats power_of_two(Floats scale) {
        const Ints bits = as_ints(maximum(broadcast(0x1p-127f), scale));
        Ints code = shift_right(add(bits, broadcast_int(0x7FFFFF - 0x3504F3)), 23);
        const Mask subnormal = less(bits, broadcast_int(0x00800000));
        code = pick(subnormal, pick(less(bits, broadcast_int(0x5A827A)), broadcast_int(0), broadcast_int(1)), code);
        code = pick(less(broadcast_int(254), code), broadcast_int(254), code);
        return as_floats(pick(less(code, broadcast_int(1)), broadcast_int(1 << 22), shift_left<23>(code)));
    }
};

}  // namespace quantlib::cpu::QUANTLIB_ISA

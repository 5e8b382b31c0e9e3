// The baseline spelling: four lanes in the compiler's own vector type (SSE2 on x86-64, NEON on aarch64), look-ups one by one.
#pragma once

namespace quantlib::cpu::scalar {

constexpr int LANES = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

inline Floats zero() { return Floats{0, 0, 0, 0}; }
inline Floats broadcast(float value) { return Floats{value, value, value, value}; }
inline Floats add(Floats a, Floats b) { return a + b; }
inline Floats subtract(Floats a, Floats b) { return a - b; }
inline Floats multiply(Floats a, Floats b) { return a * b; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline float sum(Floats a) { return (a[0] + a[2]) + (a[1] + a[3]); }

inline Floats load(const float* from) {
    Floats a;
    memcpy(&a, from, sizeof a);
    return a;
}
inline void store(float* to, Floats a) { memcpy(to, &a, sizeof a); }

// Integers

inline Ints either(Ints a, Ints b) { return a | b; }
template <int BITS>
inline Ints shift_left(Ints a) { return a << BITS; }
template <int BITS>
inline Ints clean(Ints a) { return a & ((1 << BITS) - 1); }
inline Floats number(Ints a) { return __builtin_convertvector(a, Floats); }

// CHUNK codes of one plane; the bits above a code are those of its neighbours.
template <int WIDTH>
inline void unpack(const uint8_t* from, Ints* codes) {
    constexpr int PER_BYTE = 8 / WIDTH;
    const auto code = [from](int column) { return from[column / PER_BYTE] >> (column % PER_BYTE * WIDTH); };
    for (int v = 0; v < 8; ++v) codes[v] = Ints{code(4 * v), code(4 * v + 1), code(4 * v + 2), code(4 * v + 3)};
}

// Look-ups

inline Floats gather(const float* table, Ints index) {
    return Floats{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}

// A code book of up to 16 values. Sixteen products per piece cost more than four per vector: it is not scaled as a whole.
constexpr bool SCALES_BOOK = false;
struct Book {
    const float* values;
};
inline Book book(const float* values) { return {values}; }
inline Book rescale(Book b, float) { return b; }
inline Book rescale(Book b, float, float, float) { return b; }
template <int BITS>
inline Floats look_up(Book b, Ints codes) { return gather(b.values, clean<BITS>(codes)); }

// The factors of vector `v` of a chunk, from one number per PIECE columns.
template <int PIECE>
inline Floats spread(const float* pieces, int v) { return broadcast(pieces[v * LANES / PIECE]); }

// Small floats

inline float half_value(uint32_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    uint32_t bits;
    if (magnitude >= 0x7C00u) {
        bits = 0x7F800000u | (magnitude & 0x3FFu) << 13;
    } else if (magnitude >= 0x400u) {
        bits = (magnitude << 13) + (112u << 23);
    } else {
        const float subnormal = float(magnitude) * 0x1p-24f;
        memcpy(&bits, &subnormal, 4);
    }
    bits |= sign;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t half_code(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);
    if (magnitude < 0x38800000u) {
        // Below 2^-14: adding 0.5 puts the half's last bit (2^-24) into the sum's last place, and the addition rounds.
        float absolute, shifted;
        memcpy(&absolute, &magnitude, 4);
        shifted = absolute + 0.5f;
        uint32_t rounded;
        memcpy(&rounded, &shifted, 4);
        return uint16_t(sign | (rounded - 0x3F000000u));
    }
    const uint32_t even = magnitude >> 13 & 1u;
    return uint16_t(sign | ((magnitude + 0xFFFu + even - (112u << 23)) >> 13));
}

inline uint16_t bfloat_code(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;
    return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

inline Floats load_half(const uint16_t* from) {
    Floats a;
    for (int lane = 0; lane < LANES; ++lane) a[lane] = half_value(from[lane]);
    return a;
}
inline void store_half(uint16_t* to, Floats a) {
    for (int lane = 0; lane < LANES; ++lane) to[lane] = half_code(a[lane]);
}
inline Floats round_half(Floats a) {
    for (int lane = 0; lane < LANES; ++lane) a[lane] = half_value(half_code(a[lane]));
    return a;
}
inline Floats load_bfloat(const uint16_t* from) {
    const Ints bits = {from[0] << 16, from[1] << 16, from[2] << 16, from[3] << 16};
    return reinterpret_cast<Floats>(bits);
}
inline void store_bfloat(uint16_t* to, Floats a) {
    for (int lane = 0; lane < LANES; ++lane) to[lane] = bfloat_code(a[lane]);
}
inline Floats round_bfloat(Floats a) {
    uint16_t codes[LANES];
    store_bfloat(codes, a);
    return load_bfloat(codes);
}

// E4M3's bits, put into fp16's places, are the value times 2^-8, subnormals included; 0x7F and 0xFF are NaN.
inline Floats load_e4m3(const uint8_t* from) {
    Floats a;
    for (int lane = 0; lane < LANES; ++lane) {
        const uint32_t code = from[lane], magnitude = code & 0x7Fu;
        a[lane] = half_value(magnitude == 0x7Fu ? 0x7E00u : (code & 0x80u) << 8 | magnitude << 7) * 256.0f;
    }
    return a;
}
// E5M2 is the upper byte of an fp16.
inline Floats load_e5m2(const uint8_t* from) {
    Floats a;
    for (int lane = 0; lane < LANES; ++lane) a[lane] = half_value(uint32_t(from[lane]) << 8);
    return a;
}

// Comparing and rounding, for choosing codes. Where one operand is NaN, minimum and maximum give the second.

typedef Ints Mask;
inline Ints as_ints(Floats a) { return reinterpret_cast<Ints>(a); }
inline Floats as_floats(Ints a) { return reinterpret_cast<Floats>(a); }
inline Ints broadcast_int(int32_t value) { return Ints{value, value, value, value}; }
inline Ints add(Ints a, Ints b) { return a + b; }
inline Ints subtract(Ints a, Ints b) { return a - b; }
inline Ints both(Ints a, Ints b) { return a & b; }
// The bits above come in as zeros.
inline Ints shift_right(Ints a, int bits) {
    typedef uint32_t Words __attribute__((vector_size(16)));
    return reinterpret_cast<Ints>(reinterpret_cast<Words>(a) >> uint32_t(bits));
}
inline Floats divide(Floats a, Floats b) { return a / b; }
inline Mask less(Floats a, Floats b) { return a < b; }
inline Mask equal(Floats a, Floats b) { return a == b; }
inline Mask less(Ints a, Ints b) { return a < b; }
inline Ints pick(Mask which, Ints yes, Ints no) { return (which & yes) | (~which & no); }
inline Floats pick(Mask which, Floats yes, Floats no) { return as_floats(pick(which, as_ints(yes), as_ints(no))); }
inline Floats minimum(Floats a, Floats b) { return pick(less(a, b), a, b); }
inline Floats maximum(Floats a, Floats b) { return pick(less(b, a), a, b); }
inline float least_lane(Floats a) {
    const float x = a[0] < a[1] ? a[0] : a[1], y = a[2] < a[3] ? a[2] : a[3];
    return x < y ? x : y;
}
inline float greatest_lane(Floats a) {
    const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
}
// To the nearest integer, ties to even. Below 2^23, adding and subtracting 2^23 rounds; the sign of a zero is put back.
inline Floats round_even(Floats a) {
    const Ints sign = as_ints(a) & broadcast_int(int32_t(0x80000000u));
    const Floats magnitude = as_floats(as_ints(a) & broadcast_int(0x7FFFFFFF)), large = broadcast(0x1p23f);
    const Floats rounded = as_floats(as_ints((magnitude + large) - large) | sign);
    return pick(less(magnitude, large), rounded, a);
}
// Whole numbers within int32 -> integers.
inline Ints integer(Floats a) { return __builtin_convertvector(a, Ints); }
// The low byte of every lane.
inline void store_bytes(uint8_t* to, Ints a) {
    for (int lane = 0; lane < LANES; ++lane) to[lane] = uint8_t(a[lane]);
}

// How many of 15 ascending bounds (of 16 numbers; the last is not read) lie below a number: none below NaN.
struct Ladder {
    const float* bounds;
};
inline Ladder ladder(const float* bounds) { return {bounds}; }
inline Ints rank(Ladder l, Floats x) {
    Ints found = broadcast_int(0);
    for (int i = 0; i < 15; ++i) found -= less(broadcast(l.bounds[i]), x);
    return found;
}

}  // namespace quantlib::cpu::scalar

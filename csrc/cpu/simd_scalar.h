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
inline Floats load_bfloat(const uint16_t* from) {
    const Ints bits = {from[0] << 16, from[1] << 16, from[2] << 16, from[3] << 16};
    return reinterpret_cast<Floats>(bits);
}
inline void store_bfloat(uint16_t* to, Floats a) {
    for (int lane = 0; lane < LANES; ++lane) to[lane] = bfloat_code(a[lane]);
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

}  // namespace quantlib::cpu::scalar

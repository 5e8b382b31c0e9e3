// From packed codes to fp32 numbers without moving them: a 32-bit lane that holds several codes is masked to one of them and
// converted as an integer, which gives the code times 2^position. x is scaled down by as much (exactly), and what a codec
// subtracts from its codes is multiplied by sums of x instead. On Zen 3 masks run in any pipe, conversions in those that products
// leave free: three instructions for eight weights.
//
// Lane l of every vector holds one of the eight neighbouring columns 8l ... 8l + 7.
#pragma once

#include "lookup_decode.h"

#ifdef QUANTLIB_HAS_LOOKUP
namespace quantlib::cpu::QUANTLIB_ISA {

// A span's codes as they lie, for vectors 0-3 and 4-7.
struct Packed {
    Ints half[2];
};

// What these decoders have: packed(), the codes of a span; vector(), one vector of their numbers; place(), the power of two by
// which its numbers are too large. value = number - offset.
struct PlaceDecoder : Decoder {
    static constexpr bool IN_PLACE = true;
    float offset;
    explicit PlaceDecoder(const Plan& plan) : offset(plan.offset) {}
};

// Integers of 4 bits, as they lie.
struct Nibbles : PlaceDecoder {
    using PlaceDecoder::PlaceDecoder;
    static int column(int vector, int lane) { return 8 * lane + vector; }
    static int place(int vector) { return 4 * (vector % HALF); }
    QUANTLIB_INLINE Packed packed(const Planes& planes, int64_t span, int64_t ahead) const {
        const uint8_t* from = planes.plane[0] + span * (SPAN / 2);
        fetch_near(from + ahead);
        const Ints lanes = load_bytes(from);
        return {lanes, _mm256_srli_epi32(lanes, 16)};
    }
    QUANTLIB_INLINE static Floats vector(const Packed& from, int v) {
        return number(_mm256_and_si256(from.half[v / HALF], _mm256_set1_epi32(0xF << 4 * (v % HALF))));
    }
};

// Bytes below 128: those of even columns are vectors 0-3, those of odd ones 4-7.
struct PlaceBytes : PlaceDecoder {
    using PlaceDecoder::PlaceDecoder;
    static int column(int vector, int lane) { return 8 * lane + vector % HALF * 2 + vector / HALF; }
    static int place(int vector) { return 8 * (vector % HALF); }
    QUANTLIB_INLINE static Floats vector(const Packed& from, int v) {
        return number(_mm256_and_si256(from.half[v / HALF], _mm256_set1_epi32(0x7F << 8 * (v % HALF))));
    }
};

// Integers of up to 7 bits in one plane or several.
template <int BITS>
struct PlaceIntegers : PlaceBytes {
    using PlaceBytes::PlaceBytes;
    QUANTLIB_INLINE Packed packed(const Planes& planes, int64_t span, int64_t ahead) const {
        const ByteCodes codes = byte_codes<BITS>(planes, span, ahead);
        return {codes.even, codes.odd};
    }
};

// As with_lookup, for dot products.
template <class With>
inline void with_places(const Plan& plan, bool rounded, With with) {
    if (plan.codec == CodecKind::affine) {
        switch (plan.bits) {
            case 2: return with_lanes(plan, PlaceIntegers<2>(plan), with);
            case 3: return with_lanes(plan, PlaceIntegers<3>(plan), with);
            case 4: return with_lanes(plan, Nibbles(plan), with);
            case 5: return with_lanes(plan, PlaceIntegers<5>(plan), with);
            case 6: return with_lanes(plan, PlaceIntegers<6>(plan), with);
            case 7: return with_lanes(plan, PlaceIntegers<7>(plan), with);
            default: return with_lanes(plan, Bytes(plan), with);
        }
    }
    switch (plan.bits) {
        case 2: return with_book<2>(plan, rounded, with);
        case 3: return with_book<3>(plan, rounded, with);
        case 4: return with_book<4>(plan, rounded, with);
        default: return with_floats(plan, with);
    }
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

// x as bf16 numbers in the order in which weights are decoded (pairs_decode.h), made once per call.
//
// bf16 is one plane; fp16 is the sum of two, fp32 of three: the upper bits of what is left, cut off, so that a product with each
// plane is exact and their sum is that of x.
#pragma once

#include "convert.h"
#include "pairs_decode.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

inline int planes_in(DType dtype) { return dtype == DType::bfloat16 ? 1 : dtype == DType::float16 ? 2 : 3; }

// Take the upper 16 bits out of `rest`. What isn't a number, or infinite, stays whole in the first plane.
inline void cut_words(float* rest, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        memcpy(&bits, rest + i, 4);
        const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
        uint32_t upper = bits & 0xFFFF0000u;
        if (!finite && (bits & 0x007FFFFFu) != 0) upper |= 0x00400000u;
        to[i] = uint16_t(upper >> 16);
        float taken;
        memcpy(&taken, &upper, 4);
        rest[i] = finite ? rest[i] - taken : 0.0f;
    }
}

// Words of one row of x: `planes` runs of `spans` * SPAN, zero beyond column k. `parted`: each vector's even words first.
inline void arrange_row(const LinearCall& call, int64_t m, int64_t spans, bool parted, uint16_t* to) {
    const int64_t k = call.plan->k;
    const uint8_t* row = static_cast<const uint8_t*>(call.x) + m * call.x_row_stride * item_size(call.dtype);
    const int planes = planes_in(call.dtype);
    for (int64_t span = 0; span < spans; ++span) {
        const int64_t start = span * SPAN, count = least(SPAN, k - start);
        const uint8_t* from = row + start * call.x_column_stride * item_size(call.dtype);
        uint16_t natural[SPAN] = {};
        float rest[SPAN];
        if (call.dtype != DType::bfloat16) {
            read_strided(call.dtype, from, call.x_column_stride, count, rest);
        } else if (call.x_column_stride == 1) {
            memcpy(natural, from, count * 2);
        } else {
            for (int64_t i = 0; i < count; ++i) memcpy(natural + i, from + i * call.x_column_stride * 2, 2);
        }
        for (int plane = 0; plane < planes; ++plane) {
            if (call.dtype != DType::bfloat16) cut_words(rest, count, natural);
            uint16_t* out = to + (plane * spans + span) * SPAN;
            for (int turn = 0; turn < TURNS; ++turn) {
                const Words words = every_fourth(natural, turn);
                store_words(out + turn * WORDS, parted ? part_words(words) : words);
            }
        }
    }
}

// The sums of x over each lane's eight columns, added as products with ones are: what zeros and minima are multiplied by.
inline void sum_lanes(const uint16_t* row, int planes, int64_t spans, float* to) {
    const Words ones = same_words(0x3F80);
    for (int64_t span = 0; span < spans; ++span) {
        Floats total = zero();
        for (int plane = 0; plane < planes; ++plane) {
            const uint16_t* from = row + (plane * spans + span) * SPAN;
            for (int turn = 0; turn < TURNS; ++turn) total = dot(total, ones, load_words(from + turn * WORDS));
        }
        store(to + span * LANES, total);
    }
}

// Sums of `count` lanes each, of `lanes` of them, zeros after the last; `to` may be `from`.
inline void sum_pieces(const float* from, int64_t count, int64_t lanes, float* to) {
    const int64_t pieces = lanes / count;
    for (int64_t p = 0; p < pieces; ++p) {
        float total = from[p * count];
        for (int64_t lane = 1; lane < count; ++lane) total += from[p * count + lane];
        to[p] = total;
    }
    for (int64_t p = pieces; p < lanes; ++p) to[p] = 0.0f;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

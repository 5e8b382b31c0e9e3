// x as bf16 numbers in the order in which weights are decoded (pairs_decode.h), made once per call.
//
// bf16 is one plane; fp16 is the sum of two, fp32 of three: the upper bits of what is left, cut off, so that a product with each
// plane is exact and their sum is that of x.
#pragma once

#include "convert.h"
#include "pairs_decode.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int MOST_PLANES = 3;
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

// The words of one span of row m of x, in planes, as they come; zero beyond column k.
inline void read_span(const LinearCall& call, int64_t m, int64_t span, int planes, uint16_t (*to)[SPAN]) {
    const int64_t start = span * SPAN, count = most(0, least(SPAN, call.plan->k - start)), size = item_size(call.dtype);
    const uint8_t* from = static_cast<const uint8_t*>(call.x) + (m * call.x_row_stride + start * call.x_column_stride) * size;
    memset(to, 0, planes * sizeof(*to));
    if (call.dtype != DType::bfloat16) {
        float rest[SPAN];
        read_strided(call.dtype, from, call.x_column_stride, count, rest);
        for (int plane = 0; plane < planes; ++plane) cut_words(rest, count, to[plane]);
    } else if (call.x_column_stride == 1) {
        memcpy(to[0], from, count * size);
    } else {
        for (int64_t i = 0; i < count; ++i) memcpy(to[0] + i, from + i * call.x_column_stride * size, size);
    }
}

// Words of one row of x: `planes` runs of `spans` * SPAN, zero beyond column k. `parted`: each vector's even words first.
inline void arrange_row(const LinearCall& call, int64_t m, int64_t spans, bool parted, uint16_t* to) {
    const int planes = planes_in(call.dtype);
    uint16_t natural[MOST_PLANES][SPAN];
    for (int64_t span = 0; span < spans; ++span) {
        read_span(call, m, span, planes, natural);
        for (int plane = 0; plane < planes; ++plane) {
            uint16_t* out = to + (plane * spans + span) * SPAN;
            for (int turn = 0; turn < TURNS; ++turn) {
                const Words words = every_fourth(natural[plane], turn);
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

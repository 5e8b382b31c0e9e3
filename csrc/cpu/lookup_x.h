// x in fp32, in the order in which weights are decoded (lookup_decode.h), made once per call.
#pragma once

#include "lookup_scales.h"

#ifdef QUANTLIB_HAS_LOOKUP
namespace quantlib::cpu::QUANTLIB_ISA {

// Rows a multiple of 4096 bytes apart would all compete for the same few sets of the first-level cache.
constexpr int64_t x_stride_of(int64_t spans) { return spans * SPAN + 2 * LANES; }

// The column, within its span, of each number of a decoded span, and what the decoder makes too large, in each vector.
struct Order {
    int column[SPAN];
    float excess[SPAN_VECTORS], share[SPAN_VECTORS];
    template <class Codes>
    explicit Order(const Codes&) {
        for (int i = 0; i < SPAN; ++i) column[i] = Codes::column(i / LANES, i % LANES);
        for (int v = 0; v < SPAN_VECTORS; ++v) excess[v] = float(1u << Codes::place(v)), share[v] = 1 / excess[v];
    }
};

// One row of x, zero beyond column k.
inline void arrange_row(const LinearCall& call, const Order& order, int64_t m, int64_t spans, float* to) {
    const int64_t k = call.plan->k, size = item_size(call.dtype);
    const uint8_t* from = static_cast<const uint8_t*>(call.x) + m * call.x_row_stride * size;
    for (int64_t span = 0; span < spans; ++span, to += SPAN) {
        float natural[SPAN] = {};
        const int64_t start = span * SPAN;
        read_strided(call.dtype, from + start * call.x_column_stride * size, call.x_column_stride, least(SPAN, k - start), natural);
        for (int i = 0; i < SPAN; ++i) to[i] = natural[order.column[i]] * order.share[i / LANES];
    }
}

// The sums of x over each lane of the halves of every span: what zeros and minima are multiplied by.
inline void sum_halves(const float* x, const Order& order, int64_t spans, float* to) {
    for (int64_t half = 0; half < 2 * spans; ++half, x += HALF * LANES) {
        Floats sum = zero();
        for (int v = 0; v < HALF; ++v) sum = multiply_add(load(x + v * LANES), broadcast(order.excess[half % 2 * HALF + v]), sum);
        store(to + half * LANES, sum);
    }
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

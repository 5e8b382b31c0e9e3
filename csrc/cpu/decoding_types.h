// Calls of the small steps between products when one token after another is generated (program.h). Plain data, as in types.h.
#pragma once

#include "types.h"

namespace quantlib::cpu {

// y[rows, width] = weight * (x / sqrt(mean of x^2 + epsilon)), the mean over a row.
struct NormCall {
    DType dtype;
    const void* x;
    const void* weight;  // [width]
    void* y;
    int64_t rows, width;
    float epsilon;
};

// Heads of one position, rotated by the position's angles: (a, b) -> (a cos - b sin, b cos + a sin) for a of the lower and b of
// the upper half of a head. Null cosine: only copied.
struct RotateCall {
    DType dtype;
    const void* x;                // [heads, width]
    const void *cosine, *sine;    // [width]
    void* y;                      // head h begins at h * y_stride elements; may be x
    int64_t y_stride;
    int64_t heads, width;
};

// The same of `positions` positions, whose x and angles lie one behind the other.
struct PromptRotateCall {
    RotateCall first;
    int64_t positions, y_position_stride;  // in elements
};

// y[h] = softmax(scale * q[h] K^T) V over the first `positions` keys and values of the head's group.
struct AttentionCall {
    DType dtype;
    const void* q;                 // [heads, width]
    const void *keys, *values;     // [key_heads, capacity, width]
    void* y;                       // [heads, width]
    int64_t heads, key_heads, width, capacity, positions;
    float scale;
    int threads;
};

// The same of `m` positions behind the first `start`, each of which sees those up to itself. Strides in elements, of positions and of
// heads.
struct PromptAttentionCall {
    DType dtype;
    const void* q;
    int64_t q_stride, q_head_stride;
    const void* keys;
    int64_t key_stride, key_head_stride;
    const void* values;
    int64_t value_stride, value_head_stride;
    void* y;  // [m, heads, width] contiguous
    int64_t m, start, heads, key_heads, width;
    float scale;
    int threads;
};

// y = silu(gate) * up
struct GateCall {
    DType dtype;
    const void *gate, *up;
    void* y;
    int64_t count;
};

// y += x
struct AddCall {
    DType dtype;
    const void* x;
    void* y;
    int64_t count;
};

// y[n] = W[n, k] x + bias with a weight that is not quantized.
struct DenseCall {
    DType dtype;
    const void *weight, *x;
    const void* bias;  // or null
    void* y;
    int64_t n, k;
    int threads;
};

}  // namespace quantlib::cpu

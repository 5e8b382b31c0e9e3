// What choosing scales and codes asks of the kernels: plain data only, as in types.h. Columns of a weight are contiguous.
#pragma once

#include "types.h"

namespace quantlib::cpu {

enum class RoundingKind { affine, table, minifloat };

// Everything about the codes of a weight of k columns that depends neither on its values nor on where they lie.
struct Coding {
    int64_t k;
    int64_t padded_k;  // columns that a row of codes holds; weights beyond k are 0
    int bits;
    RoundingKind rounding;

    float offset;                                // affine: value = code - offset
    float bounds[16], ranked[16];                // table: midpoints of neighbours, then inf; the values in ascending order
    int32_t order[16];                           // table: the codes in order of value
    int mantissa_bits;                           // minifloat
    float smallest, largest;                     // minifloat: the least normal value and the greatest
    bool signed_zero;                            // minifloat: -0.0 has the sign bit set, as every number below zero

    int64_t block_rows, block_cols;  // weights that share a scale; 0: the whole dimension
    int64_t blocks_across;
    int piece;  // 32, 16 or 8: the widest run of columns that starts at a multiple of itself and lies inside one block
    bool reciprocal;  // multiply by 1 / scale instead of dividing
    bool has_zero, has_minimum;

    ScaleKind scale;  // how a solved scale is rounded
    DType scale_dtype;
};

struct Weight {
    const void* data;
    DType dtype;
    int64_t rows, row_stride;  // in elements
};

// fp32, one per block; null where the format lacks them.
struct Numbers {
    const float* scale;
    const float* zero;
    const float* minimum;
};

struct ExtremesCall {
    const Coding* coding;
    Weight weight;
    float* low;  // [rows, blocks_across]: blocks are taken as if they had one row
    float* high;
    int threads;
};

struct EncodeCall {
    const Coding* coding;
    Weight weight;
    Numbers numbers;
    uint8_t* codes;  // [rows, padded_k * bits / 8]
    int threads;
};

// One number per block, blocks of one row; those that are not asked for are null.
struct Moments {
    float *vv, *vw, *ww, *v, *w, *one;
};

struct SumsCall {
    const Coding* coding;
    Weight weight;
    Weight importance;  // of each squared error, fp32; data null: 1 for all. A row stride of 0: the same for all rows
    Numbers numbers;
    float* error;     // of encoding and decoding, or null
    Moments moments;  // all null, or all that the format has
    int threads;
};

struct SearchCall {
    const Coding* coding;
    Weight weight;
    Weight importance;  // as in SumsCall
    const Numbers* candidates;  // the first is where the search starts
    int64_t candidate_count;
    int steps;
    float global_scale;
    float *scale, *zero, *minimum;  // the result
    int threads;
};

enum class Outcome { done, not_finite, no_memory };

}  // namespace quantlib::cpu

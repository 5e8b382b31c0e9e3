// What crosses the border between the bindings (compiled for the baseline) and the kernels (compiled once per instruction set):
// plain data only. No function lives here, so the linker can never pick an AVX-512 copy of one for a machine without it.
#pragma once

#include <cstdint>

namespace quantlib::cpu {

enum class DType { float32, bfloat16, float16 };
enum class CodecKind { table, affine, e4m3, e5m2 };
enum class ScaleKind { number, e4m3_global, e8m0, double_quant, super };

// Everything about a weight [n, k] of one format that does not depend on where its bytes lie (quantlib/formats).
//     w = (value[code] - zero) * scale - minimum          in fp32, each operation rounded once
struct Plan {
    int64_t n, k;
    int64_t padded_k;  // columns that a row of `codes` holds
    int bits;          // 1..8, in planes of 2^i bits, low bits first (quantlib/formats/packing.py)
    CodecKind codec;
    float offset;       // affine: value = code - offset
    float values[256];  // the value of every code; entries beyond 2^bits repeat, so that an index needs no mask
    uint16_t pairs[256];  // the same, rounded to bf16

    int64_t block_rows, block_cols;  // weights that share a scale; 0: the whole dimension
    int64_t blocks_across, supers_across;  // the latter of `super`: runs of super_count blocks that share a unit
    int piece;  // 32, 16 or 8: the widest run of columns that starts at a multiple of itself and lies inside one block
    int span_piece;  // the same, up to 128

    ScaleKind scale;
    DType scale_dtype;  // number: of scales and minima
    int super_bits, super_count;
    float super_offset;      // super: scale = (code - super_offset) * unit
    float scale_values[256];  // double_quant: the value of every scale code
    bool has_zero, has_minimum;
    bool strips;  // parts lie as in the layout `cpu_rows` (strips.h), else as in `rows`
};

// Where the bytes lie. Valid for one call; a part that the format lacks is null.
struct Parts {
    const uint8_t* codes;
    const uint8_t* scales;
    const uint8_t* minima;
    const uint8_t* zeros;
    const float* global_scale;
    const float* scale_absmax;
    const float* scale_offset;
    const uint8_t* super_scales;  // fp16
    const uint8_t* super_minima;  // fp16
};

struct LinearCall {
    const Plan* plan;
    Parts parts;
    int64_t m;
    DType dtype;  // of x and y
    const void* x;
    int64_t x_row_stride, x_column_stride;  // in elements
    const float* bias;                      // [n] or null
    void* y;                                // [m, n] contiguous
    int threads;
};

// The same for x in int8: `linear.x` holds [m, k] codes, contiguous, each 128 above its number; dtype is y's.
struct Int8Call {
    LinearCall linear;
    const float* x_scales;  // [m]
    float unit;             // every value of the weight's codec is a whole multiple of it, at most 127 of them, or -128
};

// x -> such codes and scales, or what they stand for; null: not wanted.
struct Int8RowsCall {
    int64_t m, k;
    DType dtype;
    const void* x;
    int64_t x_row_stride, x_column_stride;  // in elements
    uint8_t* codes;                         // [m, k] contiguous
    float* scales;                          // [m]
    void* rounded;                          // [m, k] contiguous, of x's dtype
    int threads;
};

// Products that read the same x, in one step: calls that differ in their weight's n, and in weight, bias and y. A quantized weight
// has the format of the first.
template <class Call>
struct Joined {
    const Call* calls;
    int64_t count;  // at least one
    bool gated;     // two of one n and one row of x: then the first's y becomes silu(y) times the second's
};

struct DequantizeCall {
    const Plan* plan;
    Parts parts;
    int64_t row_start, row_stop;
    int64_t column_start, column_stop;  // the start is a multiple of 32
    DType dtype;
    void* out;  // [row_stop - row_start, column_stop - column_start] contiguous
    int threads;
};

// Choosing scales and codes: quantize_types.h.
enum class Outcome;
struct ExtremesCall;
struct EncodeCall;
struct SumsCall;
struct SearchCall;
// Between products, one token at a time: decoding_types.h.
struct NormCall;
struct RotateCall;
struct AttentionCall;
struct PromptAttentionCall;
struct PromptRotateCall;
struct GateCall;
struct AddCall;
struct DenseCall;

// Layouts of weights that a product reads; `words`: both, but rows of whole words alone, as strips have.
enum class Reads { rows, strips, both, words };

// Those that return bool return false where scratch memory could not be had. Those with `pairs` are null where an instruction
// set has no products of bf16 pairs, those with `amx` where it has no tile registers, `int8_tile` where it has no products of bytes,
// those with `lookup` where it has no byte look-ups, or products of pairs instead.
struct Kernels {
    bool (*linear)(const Joined<LinearCall>&);
    bool (*pairs_dot)(const Joined<LinearCall>&);
    bool (*pairs_strip)(const Joined<LinearCall>&);  // of a plan with strips, as the next
    bool (*pairs_strip_tile)(const LinearCall&);
    bool (*pairs_tile)(const LinearCall&);
    bool (*pairs_dgrad)(const LinearCall&);  // x is dY [m, n], y is dX [m, k]
    bool (*amx_strip)(const Joined<LinearCall>&);
    bool (*amx_linear)(const LinearCall&);
    bool (*amx_dgrad)(const LinearCall&);  // the same
    bool (*rows_to_int8)(const Int8RowsCall&);
    bool (*int8_tile)(const Int8Call&);
    bool (*lookup_dot)(const Joined<LinearCall>&);
    bool (*lookup_tile)(const LinearCall&);
    bool (*dequantize)(const DequantizeCall&);
    Outcome (*extremes)(const ExtremesCall&);
    Outcome (*encode)(const EncodeCall&);
    Outcome (*sums)(const SumsCall&);
    Outcome (*search)(const SearchCall&);
    bool (*rms_norm)(const NormCall&);
    bool (*rotate)(const RotateCall&);
    bool (*attention)(const AttentionCall&);
    bool (*prompt_attention)(const PromptAttentionCall&);
    bool (*prompt_norm)(const NormCall&, int threads);
    bool (*prompt_gate)(const GateCall&, int threads);
    bool (*prompt_rotate)(const PromptRotateCall&, int threads);
    bool (*gate)(const GateCall&);
    bool (*add_to)(const AddCall&);
    bool (*dense)(const Joined<DenseCall>&);
};

}  // namespace quantlib::cpu

// Products of two block-scaled operands, y[M, N] = x W^T + bias: what a launcher is told, without a word of CUTLASS.
//
// Codes lie as in the rows layout, [N, K] and [M, K] with K contiguous; scales in the 128x4 order of
// quantlib/layouts/swizzled.py, the pad zero. K counts the columns that are stored, pad of whole blocks included.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantlib::cuda {

// Addresses are 0 where there is no such operand.
struct ScaledGemm {
    std::uintptr_t w_codes, w_scales;    // [N, K] and its block scales
    std::uintptr_t x_codes, x_scales;    // [M, K] and its block scales
    std::uintptr_t w_global, x_global;   // fp32, one each: what the sums are multiplied by (NVFP4), read by the device alone
    std::uintptr_t bias;                 // [N], of y's dtype, 16-byte aligned
    std::uintptr_t y;                    // [M, N], contiguous, bf16 or fp16
    int m, n, k;
    bool half;                           // y and bias are fp16 instead of bf16
    std::uintptr_t workspace;            // at least workspace_bytes of the same problem
    std::size_t workspace_bytes;
    int sms;                             // multiprocessors to fill
    bool share_k;                        // where the tile can: several of them may share the K of a tile
    std::uintptr_t stream;
};

// NVFP4 times NVFP4 with a result that is quantized to NVFP4 again.
struct QuantizingGemm {
    ScaledGemm gemm;                     // y: the codes [M, N / 2] of the result; bias in bf16; x_global unused
    std::uintptr_t alpha;                // fp32: the product of both global scales
    std::uintptr_t y_scales;             // the result's block scales, swizzled, written where y has rows
    std::uintptr_t y_inverse_global;     // fp32: 1 / the result's global scale
};

// Compiled kernels. `workspace`: the bytes of scratch memory that a problem needs, whatever its addresses are.
struct ScaledGemmInstance {
    const char* name;
    void (*run)(const char* name, const ScaledGemm&);
    std::size_t (*workspace)(const ScaledGemm&);
};
struct QuantizingGemmInstance {
    const char* name;
    void (*run)(const char* name, const QuantizingGemm&);
};

}  // namespace quantlib::cuda

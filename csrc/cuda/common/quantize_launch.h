// Launchers of the activation quantizer: addresses, sizes and the stream, as Python gives them.
#pragma once

#include <cstdint>

namespace quantlib::cuda {

// x [M, K] of fp16 (half) or bf16, `stride` elements from row to row; M > 0.
struct Activations {
    std::uintptr_t x;
    bool half;
    int m, k;
    std::int64_t stride;
};

// How many uint32 `quantize_multiplier` needs for peaks.
int quantize_peaks(int m, int k);

// x -> NVFP4's fp32 multiplier. peaks: quantize_peaks(m, k) words; counter: an int32 that is zero, and zero again afterwards.
void quantize_multiplier(const Activations& x, std::uintptr_t peaks, std::uintptr_t counter, std::uintptr_t multiplier,
                         std::uintptr_t stream);

// x -> codes [M, K in whole blocks] and block scales in whole 128x4 tiles, pad included. multiplier: NVFP4's, else 0.
using QuantizeLauncher = void(const Activations& x, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t multiplier,
                              std::uintptr_t stream);

// By format; _ceil: MX scales for which nothing saturates.
QuantizeLauncher quantize_nvfp4, quantize_mxfp8, quantize_mxfp4, quantize_mxfp8_ceil, quantize_mxfp4_ceil;

}  // namespace quantlib::cuda

// Launches of the activation quantizer (quantize.h).
#include "quantize.h"

#include "check.h"
#include "quantize_launch.h"

namespace quantlib::cuda {

namespace {

constexpr int MOST_PEAKS = 512;  // blocks of the first pass: enough to fill a chip, few enough for one block to read

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int across, int down, int threads, int shared, [[maybe_unused]] std::uintptr_t stream,
            Arguments... arguments) {
#ifdef QUANTLIB_SIMT
    simt::launch({across, down}, threads, shared, [=] { kernel(arguments...); });
#else
    kernel<<<dim3(across, down), threads, shared, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
#endif
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

Rows rows_of(const Activations& a) {
    const bool aligned = a.x % 16 == 0 && a.stride % LANE_COLUMNS == 0;
    return {reinterpret_cast<const std::byte*>(a.x), a.m, a.k, a.stride, aligned};
}

void launched([[maybe_unused]] const char* kernel, [[maybe_unused]] const Activations& a) {
#ifndef QUANTLIB_SIMT
    check_launch(kernel, {{"M", a.m}, {"K", a.k}});
#endif
}

// Blocks of the first pass: along K, and as many along M as there may be.
int peaks_across(const Activations& a) { return ceil_div(a.k, ABSMAX_COLUMNS); }
int peaks_down(const Activations& a) {
    const int most = MOST_PEAKS / peaks_across(a);
    return a.m < most ? a.m : most > 1 ? most : 1;
}

template <class Format, bool CEIL>
void quantize(const char* name, const Activations& a, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t multiplier,
              std::uintptr_t stream) {
    const int across = ceil_div(a.k, Format::GROUP), tiles = ceil_div(across, 4);
    const Quantized out{reinterpret_cast<std::byte*>(codes), reinterpret_cast<std::byte*>(scales), across * Format::GROUP, across,
                        reinterpret_cast<const float*>(multiplier)};
    const int down = ceil_div(ceil_div(a.m, 128) * 128, QUANTIZE_ROWS), chunks = ceil_div(tiles * 4 * Format::GROUP, CHUNK);
    const auto kernel = a.half ? quantize_kernel<Format, Half, CEIL> : quantize_kernel<Format, Bf16, CEIL>;
    launch(kernel, down, chunks, QUANTIZE_WARPS * WARP, 0, stream, rows_of(a), out);
    launched(name, a);
}

}  // namespace

int quantize_peaks(int m, int k) {
    const Activations a{0, false, m, k, k};
    return peaks_across(a) * peaks_down(a);
}

void quantize_multiplier(const Activations& a, std::uintptr_t peaks, std::uintptr_t counter, std::uintptr_t multiplier,
                         std::uintptr_t stream) {
    const auto kernel = a.half ? absmax_kernel<Half> : absmax_kernel<Bf16>;
    launch(kernel, peaks_across(a), peaks_down(a), ABSMAX_THREADS, 4 * (ABSMAX_THREADS / WARP + 1), stream, rows_of(a),
           reinterpret_cast<uint32_t*>(peaks), reinterpret_cast<int*>(counter), reinterpret_cast<float*>(multiplier));
    launched("quantize_multiplier", a);
}

void quantize_nvfp4(const Activations& a, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t multiplier,
                    std::uintptr_t stream) {
    quantize<Nvfp4Codes, false>("quantize_nvfp4", a, codes, scales, multiplier, stream);
}

void quantize_mxfp8(const Activations& a, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t multiplier,
                    std::uintptr_t stream) {
    quantize<Mxfp8Codes, false>("quantize_mxfp8", a, codes, scales, multiplier, stream);
}

void quantize_mxfp4(const Activations& a, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t multiplier,
                    std::uintptr_t stream) {
    quantize<Mxfp4Codes, false>("quantize_mxfp4", a, codes, scales, multiplier, stream);
}

void quantize_mxfp8_ceil(const Activations& a, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t multiplier,
                         std::uintptr_t stream) {
    quantize<Mxfp8Codes, true>("quantize_mxfp8_ceil", a, codes, scales, multiplier, stream);
}

void quantize_mxfp4_ceil(const Activations& a, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t multiplier,
                         std::uintptr_t stream) {
    quantize<Mxfp4Codes, true>("quantize_mxfp4_ceil", a, codes, scales, multiplier, stream);
}

}  // namespace quantlib::cuda

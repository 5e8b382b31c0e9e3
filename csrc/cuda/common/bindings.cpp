// What common/ adds to quantlib._cuda: the activation quantizer.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "quantize_launch.h"

namespace py = pybind11;

namespace quantlib::cuda {

void bind_common(py::module_& module) {
    module.def("quantize_peaks", &quantize_peaks, py::arg("m"), py::arg("k"), "The uint32 that quantize_multiplier needs.");
    module.def(
        "quantize_multiplier",
        [](std::uintptr_t x, bool half, int m, int k, std::int64_t stride, std::uintptr_t peaks, std::uintptr_t counter,
           std::uintptr_t multiplier, std::uintptr_t stream) {
            quantize_multiplier({x, half, m, k, stride}, peaks, counter, multiplier, stream);
        },
        py::arg("x"), py::arg("half"), py::arg("m"), py::arg("k"), py::arg("stride"), py::arg("peaks"), py::arg("counter"),
        py::arg("multiplier"), py::arg("cuda_stream"), "x [M, K] in 16 bits -> NVFP4's fp32 multiplier.");
    constexpr std::pair<const char*, QuantizeLauncher*> formats[] = {
        {"quantize_nvfp4", quantize_nvfp4},           {"quantize_mxfp8", quantize_mxfp8},
        {"quantize_mxfp4", quantize_mxfp4},           {"quantize_mxfp8_ceil", quantize_mxfp8_ceil},
        {"quantize_mxfp4_ceil", quantize_mxfp4_ceil},
    };
    for (const auto& [name, quantize] : formats) {
        module.def(
            name,
            [quantize = quantize](std::uintptr_t x, bool half, int m, int k, std::int64_t stride, std::uintptr_t codes,
                                  std::uintptr_t scales, std::uintptr_t multiplier, std::uintptr_t stream) {
                quantize({x, half, m, k, stride}, codes, scales, multiplier, stream);
            },
            py::arg("x"), py::arg("half"), py::arg("m"), py::arg("k"), py::arg("stride"), py::arg("codes"), py::arg("scales"),
            py::arg("multiplier"), py::arg("cuda_stream"),
            "x [M, K] in 16 bits -> codes and block scales in the 128x4 order; multiplier: NVFP4's, else 0.");
    }
}

}  // namespace quantlib::cuda

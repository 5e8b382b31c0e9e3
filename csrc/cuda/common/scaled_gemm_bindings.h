// How block-scaled products are offered to Python: per pair of formats a launcher and the size of its workspace, by tile.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "scaled_gemm.h"

namespace quantlib::cuda {

struct NamedTile {
    std::string_view tile;
    const ScaledGemmInstance* kernel;
};

// What CUTLASS would answer by ending the process: no driver, or operands that tensor copies can't address.
inline void check_operands(const char* kernel, const ScaledGemm& p) {
    int device = 0;
    check(cudaGetDevice(&device), kernel, {{"M", p.m}, {"N", p.n}, {"K", p.k}});
    const auto lies_at = [&](const char* what, std::uintptr_t address, unsigned multiple) {
        if (address == 0 || address % multiple != 0) {
            throw CudaError(kernel, in_words({{"M", p.m}, {"N", p.n}, {"K", p.k}}),
                            std::string(what) + " must lie at a multiple of " + std::to_string(multiple) + " bytes", 0);
        }
    };
    lies_at("codes of W", p.w_codes, 32);
    lies_at("codes of x", p.x_codes, 32);
    lies_at("scales of W", p.w_scales, 16);
    lies_at("scales of x", p.x_scales, 16);
    lies_at("y", p.y, 16);
    if (p.bias != 0) lies_at("bias", p.bias, 16);
}

// {chip}_{pair}_gemm and {chip}_{pair}_workspace
inline void bind_scaled_gemm(pybind11::module_& module, const std::string& name, std::vector<NamedTile> tiles) {
    namespace py = pybind11;
    const auto kernel_of = [tiles = std::move(tiles), name](std::string_view wanted) -> const ScaledGemmInstance& {
        for (const NamedTile& known : tiles) {
            if (known.tile == wanted) return *known.kernel;
        }
        throw CudaError(name + " was not built with the tile " + std::string(wanted));
    };
    module.def(
        (name + "_gemm").c_str(),
        [kernel_of](std::string_view tile, std::uintptr_t w_codes, std::uintptr_t w_scales, std::uintptr_t x_codes,
                    std::uintptr_t x_scales, std::uintptr_t w_global, std::uintptr_t x_global, std::uintptr_t bias,
                    std::uintptr_t y, int m, int n, int k, bool half, std::uintptr_t workspace, std::size_t workspace_bytes,
                    int sms, bool share_k, std::uintptr_t stream) {
            const ScaledGemmInstance& kernel = kernel_of(tile);
            const ScaledGemm problem{w_codes, w_scales, x_codes, x_scales, w_global, x_global, bias, y, m, n, k, half,
                                     workspace, workspace_bytes, sms, share_k, stream};
            check_operands(kernel.name, problem);
            kernel.run(kernel.name, problem);
        },
        py::arg("tile"), py::arg("w_codes"), py::arg("w_scales"), py::arg("x_codes"), py::arg("x_scales"), py::arg("w_global"),
        py::arg("x_global"), py::arg("bias"), py::arg("y"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("half"),
        py::arg("workspace"), py::arg("workspace_bytes"), py::arg("sms"), py::arg("share_k"), py::arg("cuda_stream"),
        "y [M, N] = x W^T times both global scales, plus bias; addresses are 0 where there is no such operand.");
    module.def(
        (name + "_workspace").c_str(),
        [kernel_of](std::string_view tile, int m, int n, int k, int sms, bool share_k) {
            ScaledGemm problem{};
            problem.m = m, problem.n = n, problem.k = k, problem.sms = sms, problem.share_k = share_k;
            return kernel_of(tile).workspace(problem);
        },
        py::arg("tile"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("sms"), py::arg("share_k"),
        "Bytes of scratch memory.");
}

// {chip}_nvfp4_quantizing_gemm
inline void bind_quantizing_gemm(pybind11::module_& module, const QuantizingGemmInstance& kernel) {
    namespace py = pybind11;
    module.def(
        (std::string(kernel.name) + "_gemm").c_str(),
        [&kernel](std::uintptr_t w_codes, std::uintptr_t w_scales, std::uintptr_t x_codes, std::uintptr_t x_scales,
                  std::uintptr_t alpha, std::uintptr_t bias, std::uintptr_t y_codes, std::uintptr_t y_scales,
                  std::uintptr_t y_inverse_global, int m, int n, int k, int sms, std::uintptr_t stream) {
            const QuantizingGemm problem{
                {w_codes, w_scales, x_codes, x_scales, 0, 0, bias, y_codes, m, n, k, false, 0, 0, sms, false, stream},
                alpha, y_scales, y_inverse_global};
            check_operands(kernel.name, problem.gemm);
            kernel.run(kernel.name, problem);
        },
        py::arg("w_codes"), py::arg("w_scales"), py::arg("x_codes"), py::arg("x_scales"), py::arg("alpha"), py::arg("bias"),
        py::arg("y_codes"), py::arg("y_scales"), py::arg("y_inverse_global"), py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("sms"), py::arg("cuda_stream"), "y = x W^T alpha + bias (bf16), quantized to NVFP4 with a given global scale.");
}

}  // namespace quantlib::cuda

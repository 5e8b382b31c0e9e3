// What sm120/ adds to quantlib._cuda: block-scaled products on sm_120 and sm_121.
#include "../common/scaled_gemm_bindings.h"

namespace quantlib::cuda {

namespace sm120 {
extern const ScaledGemmInstance nvfp4_narrow, nvfp4_wide, mxfp4_narrow, mxfp4_wide;
extern const ScaledGemmInstance mxfp8_narrow, mxfp8_mxfp4_narrow;
extern const QuantizingGemmInstance nvfp4_quantizing;
}  // namespace sm120

void bind_sm120(pybind11::module_& module) {
    using namespace sm120;
    bind_scaled_gemm(module, "sm120_nvfp4", {{"narrow", &nvfp4_narrow}, {"wide", &nvfp4_wide}});
    bind_scaled_gemm(module, "sm120_mxfp4", {{"narrow", &mxfp4_narrow}, {"wide", &mxfp4_wide}});
    bind_scaled_gemm(module, "sm120_mxfp8", {{"narrow", &mxfp8_narrow}});
    bind_scaled_gemm(module, "sm120_mxfp8_mxfp4", {{"narrow", &mxfp8_mxfp4_narrow}});
    bind_quantizing_gemm(module, nvfp4_quantizing);
}

}  // namespace quantlib::cuda

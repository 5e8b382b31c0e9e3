// What sm100/ adds to quantlib._cuda: block-scaled products on sm_100 and sm_103.
#include "../common/scaled_gemm_bindings.h"

namespace quantlib::cuda {

namespace sm100 {
extern const ScaledGemmInstance nvfp4_narrow, nvfp4_middle, nvfp4_wide, mxfp4_narrow, mxfp4_middle, mxfp4_wide;
extern const ScaledGemmInstance mxfp8_narrow, mxfp8_middle, mxfp8_wide;
extern const ScaledGemmInstance mxfp8_mxfp4_narrow, mxfp8_mxfp4_middle, mxfp8_mxfp4_wide;
extern const QuantizingGemmInstance nvfp4_quantizing;
}  // namespace sm100

void bind_sm100(pybind11::module_& module) {
    using namespace sm100;
    bind_scaled_gemm(module, "sm100_nvfp4", {{"narrow", &nvfp4_narrow}, {"middle", &nvfp4_middle}, {"wide", &nvfp4_wide}});
    bind_scaled_gemm(module, "sm100_mxfp4", {{"narrow", &mxfp4_narrow}, {"middle", &mxfp4_middle}, {"wide", &mxfp4_wide}});
    bind_scaled_gemm(module, "sm100_mxfp8", {{"narrow", &mxfp8_narrow}, {"middle", &mxfp8_middle}, {"wide", &mxfp8_wide}});
    bind_scaled_gemm(module, "sm100_mxfp8_mxfp4",
                     {{"narrow", &mxfp8_mxfp4_narrow}, {"middle", &mxfp8_mxfp4_middle}, {"wide", &mxfp8_mxfp4_wide}});
    bind_quantizing_gemm(module, nvfp4_quantizing);
}

}  // namespace quantlib::cuda

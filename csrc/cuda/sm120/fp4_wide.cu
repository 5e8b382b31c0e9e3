#include "tiles.h"

namespace quantlib::cuda::sm120 {

using Nvfp4Wide = Scaled<Nvfp4, Wide<cutlass::gemm::KernelTmaWarpSpecializedNvf4Sm120>>;
using Mxfp4Wide = Scaled<Mxfp4, Wide<cutlass::gemm::KernelTmaWarpSpecializedMxf4Sm120>>;

extern const ScaledGemmInstance nvfp4_wide{"sm120_nvfp4_wide", Nvfp4Wide::run, Nvfp4Wide::workspace};
extern const ScaledGemmInstance mxfp4_wide{"sm120_mxfp4_wide", Mxfp4Wide::run, Mxfp4Wide::workspace};

}  // namespace quantlib::cuda::sm120

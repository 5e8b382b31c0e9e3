#include "tiles.h"

namespace quantlib::cuda::sm120 {

using Nvfp4Narrow = Scaled<Nvfp4, Narrow<cutlass::gemm::KernelTmaWarpSpecializedNvf4Sm120>>;
using Mxfp4Narrow = Scaled<Mxfp4, Narrow<cutlass::gemm::KernelTmaWarpSpecializedMxf4Sm120>>;

extern const ScaledGemmInstance nvfp4_narrow{"sm120_nvfp4_narrow", Nvfp4Narrow::run, Nvfp4Narrow::workspace};
extern const ScaledGemmInstance mxfp4_narrow{"sm120_mxfp4_narrow", Mxfp4Narrow::run, Mxfp4Narrow::workspace};

}  // namespace quantlib::cuda::sm120

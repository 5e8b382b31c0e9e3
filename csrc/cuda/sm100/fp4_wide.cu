#include "tiles.h"

namespace quantlib::cuda::sm100 {

using Nvfp4Wide = Scaled<Nvfp4, Wide<cutlass::gemm::KernelTmaWarpSpecialized2SmNvf4Sm100, 256>>;
using Mxfp4Wide = Scaled<Mxfp4, Wide<cutlass::gemm::KernelTmaWarpSpecialized2SmMxf4Sm100, 256>>;

extern const ScaledGemmInstance nvfp4_wide{"sm100_nvfp4_wide", Nvfp4Wide::run, Nvfp4Wide::workspace};
extern const ScaledGemmInstance mxfp4_wide{"sm100_mxfp4_wide", Mxfp4Wide::run, Mxfp4Wide::workspace};

}  // namespace quantlib::cuda::sm100

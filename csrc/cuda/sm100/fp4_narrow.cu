#include "tiles.h"

namespace quantlib::cuda::sm100 {

using Nvfp4Narrow = Scaled<Nvfp4, Narrow<cutlass::gemm::KernelTmaWarpSpecialized1SmNvf4Sm100, 256>>;
using Mxfp4Narrow = Scaled<Mxfp4, Narrow<cutlass::gemm::KernelTmaWarpSpecialized1SmMxf4Sm100, 256>>;

extern const ScaledGemmInstance nvfp4_narrow{"sm100_nvfp4_narrow", Nvfp4Narrow::run, Nvfp4Narrow::workspace};
extern const ScaledGemmInstance mxfp4_narrow{"sm100_mxfp4_narrow", Mxfp4Narrow::run, Mxfp4Narrow::workspace};

}  // namespace quantlib::cuda::sm100

#include "tiles.h"

namespace quantlib::cuda::sm100 {

using Nvfp4Middle = Scaled<Nvfp4, Middle<cutlass::gemm::KernelTmaWarpSpecialized2SmNvf4Sm100, 256>>;
using Mxfp4Middle = Scaled<Mxfp4, Middle<cutlass::gemm::KernelTmaWarpSpecialized2SmMxf4Sm100, 256>>;

extern const ScaledGemmInstance nvfp4_middle{"sm100_nvfp4_middle", Nvfp4Middle::run, Nvfp4Middle::workspace};
extern const ScaledGemmInstance mxfp4_middle{"sm100_mxfp4_middle", Mxfp4Middle::run, Mxfp4Middle::workspace};

}  // namespace quantlib::cuda::sm100

#include "tiles.h"

namespace quantlib::cuda::sm100 {

using Mxfp8Narrow = Scaled<Mxfp8, Narrow<cutlass::gemm::KernelTmaWarpSpecialized1SmMxf8f6f4Sm100, 128>>;
using Mxfp8Mxfp4Narrow = Scaled<Mxfp8Mxfp4, Narrow<cutlass::gemm::KernelTmaWarpSpecialized1SmMxf8f6f4Sm100, 128>>;

extern const ScaledGemmInstance mxfp8_narrow{"sm100_mxfp8_narrow", Mxfp8Narrow::run, Mxfp8Narrow::workspace};
extern const ScaledGemmInstance mxfp8_mxfp4_narrow{"sm100_mxfp8_mxfp4_narrow", Mxfp8Mxfp4Narrow::run, Mxfp8Mxfp4Narrow::workspace};

}  // namespace quantlib::cuda::sm100

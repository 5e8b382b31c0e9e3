#include "tiles.h"

namespace quantlib::cuda::sm100 {

using Mxfp8Wide = Scaled<Mxfp8, Wide<cutlass::gemm::KernelTmaWarpSpecialized2SmMxf8f6f4Sm100, 128>>;
using Mxfp8Mxfp4Wide = Scaled<Mxfp8Mxfp4, Wide<cutlass::gemm::KernelTmaWarpSpecialized2SmMxf8f6f4Sm100, 128>>;

extern const ScaledGemmInstance mxfp8_wide{"sm100_mxfp8_wide", Mxfp8Wide::run, Mxfp8Wide::workspace};
extern const ScaledGemmInstance mxfp8_mxfp4_wide{"sm100_mxfp8_mxfp4_wide", Mxfp8Mxfp4Wide::run, Mxfp8Mxfp4Wide::workspace};

}  // namespace quantlib::cuda::sm100

#include "tiles.h"

namespace quantlib::cuda::sm100 {

using Mxfp8Middle = Scaled<Mxfp8, Middle<cutlass::gemm::KernelTmaWarpSpecialized2SmMxf8f6f4Sm100, 128>>;
using Mxfp8Mxfp4Middle = Scaled<Mxfp8Mxfp4, Middle<cutlass::gemm::KernelTmaWarpSpecialized2SmMxf8f6f4Sm100, 128>>;

extern const ScaledGemmInstance mxfp8_middle{"sm100_mxfp8_middle", Mxfp8Middle::run, Mxfp8Middle::workspace};
extern const ScaledGemmInstance mxfp8_mxfp4_middle{"sm100_mxfp8_mxfp4_middle", Mxfp8Mxfp4Middle::run, Mxfp8Mxfp4Middle::workspace};

}  // namespace quantlib::cuda::sm100

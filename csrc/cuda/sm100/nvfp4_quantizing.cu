#include "tiles.h"

namespace quantlib::cuda::sm100 {

using Nvfp4Quantizing = Quantizing<Middle<cutlass::gemm::KernelTmaWarpSpecialized2SmNvf4Sm100, 256>>;

extern const QuantizingGemmInstance nvfp4_quantizing{"sm100_nvfp4_quantizing", Nvfp4Quantizing::run};

}  // namespace quantlib::cuda::sm100

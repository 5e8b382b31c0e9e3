#include "tiles.h"

namespace quantlib::cuda::sm120 {

using Nvfp4Quantizing = Quantizing<Unshared<cutlass::gemm::KernelTmaWarpSpecializedNvf4Sm120>>;

extern const QuantizingGemmInstance nvfp4_quantizing{"sm120_nvfp4_quantizing", Nvfp4Quantizing::run};

}  // namespace quantlib::cuda::sm120

// E2M1: NVFP4 and MXFP4.
#include "instances.h"

namespace quantlib::cuda {

void add_float4(Instances& found) {
    add_instances<ScaledFloat4, ScaledFloat4, Scaling::weights>(found, "float4", "weights");
    add_instances<Float4, Float4, Scaling::power>(found, "float4", "power");
}

}  // namespace quantlib::cuda

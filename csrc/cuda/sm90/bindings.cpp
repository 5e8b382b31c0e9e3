#include "../bindings.h"
#include "scaled_fp8_bindings.h"
#include "tile_bindings.h"

namespace quantlib::cuda {

void bind_sm90(pybind11::module_& module) {
    bind_tile(module, all_tile_variants());
    bind_scaled_fp8(module, all_scaled_fp8_variants());
}

}  // namespace quantlib::cuda

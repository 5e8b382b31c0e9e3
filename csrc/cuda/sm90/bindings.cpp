#include "../bindings.h"
#include "tile_bindings.h"

namespace quantlib::cuda {

void bind_sm90(pybind11::module_& module) { bind_tile(module, all_tile_variants()); }

}  // namespace quantlib::cuda

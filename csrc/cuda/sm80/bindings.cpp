#include "../bindings.h"
#include "fragment_bindings.h"

namespace quantlib::cuda {

void bind_sm80(pybind11::module_& module) {
    bind_fragments(module, all_instances());
}

}  // namespace quantlib::cuda

// The fragments kernels in the emulator: the same functions as quantlib._cuda's.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "sm80/fragment_bindings.h"

PYBIND11_MODULE(simt_fragments, module) {
    simt::bind(module);
    quantlib::cuda::bind_fragments(module, quantlib::cuda::all_instances());
}

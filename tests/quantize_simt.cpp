// The activation quantizer of csrc/cuda/common for the emulator: the launchers of quantlib._cuda, run on tensors of the CPU.
#include "bind.h"
#include "bindings.cpp"
#include "quantize.cu"

PYBIND11_MODULE(quantize_simt, module) {
    simt::bind(module);
    quantlib::cuda::bind_common(module);
}

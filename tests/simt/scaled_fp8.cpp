// FP8 times FP8 on Hopper in the emulator: the same functions as quantlib._cuda's. With ONE_TILE, for copies with mistakes in
// them, a single instance of each orientation.
#ifndef MODULE
#define MODULE simt_scaled_fp8
#endif
// The types' namespace is the module's: pybind11 tells the types of a process's modules apart by their names.
#define quantlib MODULE

#include <pybind11/pybind11.h>

#include "bind.h"
#include "sm80/fragment_bindings.h"
#include "sm90/scaled_fp8_bindings.h"
#ifdef ONE_TILE
#include "sm90/scaled_fp8_instances.h"
#else
#include "sm90/scaled_fp8.cu"
#endif

PYBIND11_MODULE(MODULE, module) {
    using namespace quantlib::cuda;
    simt::bind(module);
    bind_fragments(module, {});
#ifdef ONE_TILE
    bind_scaled_fp8(module, {scaled_fp8_variant<ScaledFp8Config<true, 1, 16, true>>(),
                             scaled_fp8_variant<ScaledFp8Config<false, 1, 128, false>>()});
#else
    bind_scaled_fp8(module, all_scaled_fp8_variants());
#endif
}

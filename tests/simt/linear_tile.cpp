// The Hopper kernel of the fragments layout in the emulator: the same functions as quantlib._cuda's. With ONE_TILE, for copies
// with mistakes in them, a single instance.
#ifndef MODULE
#define MODULE simt_linear_tile
#endif
// The types' namespace is the module's: pybind11 tells the types of a process's modules apart by their names.
#define quantlib MODULE

#include <pybind11/pybind11.h>

#include "bind.h"
#include "sm80/fragment_bindings.h"
#include "sm90/tile_bindings.h"
#ifdef ONE_TILE
#include "sm90/tile_instances.h"
#else
#include "sm90/linear_tile_float.cu"
#include "sm90/linear_tile_integer.cu"
#include "sm90/linear_tile_table.cu"
#endif

PYBIND11_MODULE(MODULE, module) {
    using namespace quantlib::cuda;
    simt::bind(module);
    bind_fragments(module, {});
#ifdef ONE_TILE
    bind_tile(module, {tile_variant<TileConfig<Integer<Bf16, 4>, Bf16, Scaling::half, 8, 16>>("int4", "half")});
#else
    bind_tile(module, all_tile_variants());
#endif
}

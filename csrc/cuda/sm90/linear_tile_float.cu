// Small floats: NVFP4, MXFP4, FP8.
#include "tile_instances.h"

namespace quantlib::cuda {

template <class T>
using TileE4M3 = Float8<T, 4>;
template <class T>
using TileE5M2 = Float8<T, 5>;

void add_float_tiles(std::vector<TileVariant>& found) {
    add_tile_variants<ScaledFloat4, Scaling::weights, 0>(found, "float4", "weights");
    add_tile_variants<Float4, Scaling::power, 2>(found, "float4", "power");
    add_tile_variants<TileE4M3, Scaling::grid, 0>(found, "e4m3", "grid");
    add_tile_variants<TileE4M3, Scaling::grid, 8>(found, "e4m3", "grid");
    add_tile_variants<TileE5M2, Scaling::grid, 0>(found, "e5m2", "grid");
}

}  // namespace quantlib::cuda

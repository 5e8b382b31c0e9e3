// Integers of 2, 3, 4 and 8 bits with fp16 or bf16 scales per block; scales of whole rows of any float.
#include "tile_instances.h"

namespace quantlib::cuda {

template <class T>
using TileInt2 = Integer<T, 2>;
template <class T>
using TileInt3 = Integer<T, 3>;
template <class T>
using TileInt4 = Integer<T, 4>;
template <class T>
using TileInt8 = Integer<T, 8>;

void add_integer_tiles(std::vector<TileVariant>& found) {
    add_tile_variants<TileInt2, Scaling::half, 2>(found, "int2", "half");
    add_tile_variants<TileInt3, Scaling::half, 2>(found, "int3", "half");
    add_tile_variants<TileInt4, Scaling::half, 0>(found, "int4", "half");
    add_tile_variants<TileInt4, Scaling::half, 2>(found, "int4", "half");
    add_tile_variants<TileInt4, Scaling::half, 8>(found, "int4", "half");
    add_tile_variants<TileInt8, Scaling::half, 0>(found, "int8", "half");
    add_tile_variants<TileInt8, Scaling::half, 2>(found, "int8", "half");
}

}  // namespace quantlib::cuda

// Code books of 16 numbers (NF4, FP4), with fp32 scales or with scales that are quantized themselves.
#include "tile_instances.h"

namespace quantlib::cuda {

void add_table_tiles(std::vector<TileVariant>& found) {
    add_tile_variants<Table, Scaling::single, 4>(found, "table", "single");
    add_tile_variants<Table, Scaling::twice, 4>(found, "table", "twice");
}

}  // namespace quantlib::cuda

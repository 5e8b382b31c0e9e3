// The instances of linear_tile: what each is for, and how it is launched. Host code only.
#pragma once

#include <string>
#include <vector>

#include "../common/weight.h"

namespace quantlib::cuda {

// codec, scaling: as in sm80/variants.h. piece: columns of which blocks of scales are multiples; 0: scales of whole rows and
// tensors, and those that are multiplied into weights.
struct TileVariant {
    std::string codec, scaling, dtype;
    int piece;
    int rows, columns;  // of x and of W in a block
    int depth;          // columns of W in a turn
    int threads, shared_bytes;
    int per_unit;       // programs on a multiprocessor
    void (*launch)(const LinearArguments&, int programs, void* stream);
};

// One file of instances each; they add to what is there.
void add_integer_tiles(std::vector<TileVariant>& found);
void add_table_tiles(std::vector<TileVariant>& found);
void add_float_tiles(std::vector<TileVariant>& found);

inline std::vector<TileVariant> all_tile_variants() {
    std::vector<TileVariant> found;
    for (auto add : {add_integer_tiles, add_table_tiles, add_float_tiles}) add(found);
    return found;
}

}  // namespace quantlib::cuda

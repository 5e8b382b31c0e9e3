// A TileVariant for a configuration of linear_tile, and the list of them for a codec.
#pragma once

#include "../sm80/launch.h"
#include "linear_tile.h"
#include "tile_variants.h"

namespace quantlib::cuda {

template <class Config>
void launch_tile(const LinearArguments& args, int programs, void* stream) {
    const Matrix x = {args.x, args.m, args.weight.k, args.x_stride * 2, 2};
    const TileArguments with_map = {make_tensor_map(x, Config::BM, Config::BOX_COLUMNS, Swizzle::bytes128), args};
    launch<linear_tile_kernel<Config>>("sm90_linear_tile", {{"M", args.m}, {"N", args.weight.n}, {"K", args.weight.k}},
                                       with_map, programs, Config::THREADS, Config::SHARED_BYTES, stream);
}

template <class Config>
TileVariant tile_variant(const char* codec, const char* scaling) {
    const char* dtype = IS_HALF<typename Config::T> ? "float16" : "bfloat16";
    return {codec, scaling, dtype, Config::PIECE * 16, Config::BM, Config::BN, TURN, Config::THREADS, Config::SHARED_BYTES,
            Config::PROGRAMS, &launch_tile<Config>};
}

// The numbers of rows of x.
template <class Codec, class T, Scaling SCALING, int PIECE, int... ROWS>
void add_tile_variants(std::vector<TileVariant>& found, const char* codec, const char* scaling) {
    (found.push_back(tile_variant<TileConfig<Codec, T, SCALING, PIECE, ROWS>>(codec, scaling)), ...);
}

template <template <class> class Codec, Scaling SCALING, int PIECE>
void add_tile_variants(std::vector<TileVariant>& found, const char* codec, const char* scaling) {
    add_tile_variants<Codec<Bf16>, Bf16, SCALING, PIECE, 16, 32, 64, 128>(found, codec, scaling);
    add_tile_variants<Codec<Half>, Half, SCALING, PIECE, 16, 32, 64, 128>(found, codec, scaling);
}

}  // namespace quantlib::cuda

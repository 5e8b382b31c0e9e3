// The instances of this folder's kernels for a codec, as Variants. Tiles are chosen here, once for every codec.
#pragma once

#include "dgrad_frag.h"
#include "gemv.h"
#include "launch.h"
#include "linear_frag.h"
#include "variants.h"

namespace quantlib::cuda {

inline std::string dtype_name(Half) { return "float16"; }
inline std::string dtype_name(Bf16) { return "bfloat16"; }

template <class Config>
LinearVariant linear_variant(const char* codec, const char* scaling) {
    return {codec, scaling, dtype_name(typename Config::T()), Config::BM, Config::BN, Config::WK * TURN, Config::THREADS,
            Config::SHARED_BYTES, [](const LinearArguments& args, int programs, void* stream) {
                launch<linear_frag_kernel<Config>>("sm80_linear_frag", {{"M", args.m}, {"N", args.weight.n}, {"K", args.weight.k}},
                                                   args, programs, Config::THREADS, Config::SHARED_BYTES, stream);
            }};
}

template <class Config>
LinearVariant gemv_variant(const char* codec, const char* scaling) {
    return {codec, scaling, dtype_name(typename Config::T()), Config::ROWS, STRIP, Config::WARPS * TURN, Config::THREADS,
            Config::SHARED_BYTES, [](const LinearArguments& args, int programs, void* stream) {
                launch<gemv_kernel<Config>>("sm80_gemv", {{"M", args.m}, {"N", args.weight.n}, {"K", args.weight.k}}, args, programs,
                                            Config::THREADS, Config::SHARED_BYTES, stream);
            }};
}

template <class Config>
DgradVariant dgrad_variant(const char* codec, const char* scaling) {
    return {codec, scaling, dtype_name(typename Config::T()), Config::BM, Config::BK, Config::BN, Config::THREADS,
            Config::SHARED_BYTES, [](const DgradArguments& args, int programs, void* stream) {
                launch<dgrad_frag_kernel<Config>>("sm80_dgrad_frag", {{"M", args.m}, {"N", args.weight.n}, {"K", args.weight.k}},
                                                  args, programs, Config::THREADS, Config::SHARED_BYTES, stream);
            }};
}

// Few rows of x: two groups of warps share the columns, so that more words are under way per row of x.
template <template <class> class Codec, Scaling SCALING, class T>
void add_linear(std::vector<LinearVariant>& found, const char* codec, const char* scaling) {
    found.push_back(linear_variant<LinearConfig<Codec<T>, T, SCALING, 8, 4, 2>>(codec, scaling));
    found.push_back(linear_variant<LinearConfig<Codec<T>, T, SCALING, 16, 4, 2>>(codec, scaling));
    found.push_back(linear_variant<LinearConfig<Codec<T>, T, SCALING, 32, 8, 1>>(codec, scaling));
    found.push_back(linear_variant<LinearConfig<Codec<T>, T, SCALING, 64, 8, 1>>(codec, scaling));
}

template <template <class> class Codec, Scaling SCALING, class T>
void add_dgrad(std::vector<DgradVariant>& found, const char* codec, const char* scaling) {
    found.push_back(dgrad_variant<DgradConfig<Codec<T>, T, SCALING, 16>>(codec, scaling));
    found.push_back(dgrad_variant<DgradConfig<Codec<T>, T, SCALING, 64>>(codec, scaling));
}

// Every instance for a codec. Gradient: the codec that dgrad decodes by.
template <template <class> class Codec, template <class> class Gradient, Scaling SCALING>
void add_instances(Instances& found, const char* codec, const char* scaling) {
    add_linear<Codec, SCALING, Bf16>(found.linear, codec, scaling);
    add_linear<Codec, SCALING, Half>(found.linear, codec, scaling);
    found.gemv.push_back(gemv_variant<GemvConfig<Codec<Bf16>, Bf16, SCALING>>(codec, scaling));
    found.gemv.push_back(gemv_variant<GemvConfig<Codec<Half>, Half, SCALING>>(codec, scaling));
    add_dgrad<Gradient, SCALING, Bf16>(found.dgrad, codec, scaling);
    add_dgrad<Gradient, SCALING, Half>(found.dgrad, codec, scaling);
}

}  // namespace quantlib::cuda

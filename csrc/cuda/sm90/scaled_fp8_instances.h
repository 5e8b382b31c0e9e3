// A ScaledFp8Variant for a configuration of scaled_fp8.
#pragma once

#include <stdexcept>

#include "../sm80/launch.h"
#include "scaled_fp8.h"
#include "scaled_fp8_variants.h"

namespace quantlib::cuda {

inline ResultType result_type(const std::string& name) {
    if (name == "float16") return ResultType::fp16;
    if (name == "bfloat16") return ResultType::bf16;
    if (name == "float32") return ResultType::fp32;
    throw std::invalid_argument("sm90_scaled_fp8 gives float16, bfloat16 or float32, not " + name);
}

// Boxes of the codes: `box_rows` rows of a turn.
inline TensorMap codes_map(const Fp8Operand& operand, int rows, int box_rows) {
    return make_tensor_map({operand.codes, rows, operand.columns, operand.columns, 1}, box_rows, SCALED_COLUMNS,
                           Swizzle::bytes128);
}

// Boxes of `box` scales of one turn; there are `count` of them.
inline TensorMap scales_map(const Fp8Operand& operand, int count, int turns, int box) {
    return make_tensor_map({operand.scales, operand.stepped ? turns : 1, count, operand.pitch * 4, 4}, 1, box, Swizzle::none);
}

template <class Config>
void launch_scaled_fp8(const ScaledFp8Problem& p, int programs, void* stream) {
    const int w_scales = Config::BLOCKS ? (p.n + Config::BN - 1) / Config::BN : p.n;
    const ScaledFp8Arguments args = {codes_map(p.x, p.m, Config::BM),
                                     codes_map(p.w, p.n, Config::BN),
                                     scales_map(p.x, p.m, p.schedule.turns, Config::X_SCALES),
                                     scales_map(p.w, w_scales, p.schedule.turns, Config::W_SCALES),
                                     p.x.stepped,
                                     p.w.stepped,
                                     p.m,
                                     p.n,
                                     p.y,
                                     p.bias,
                                     result_type(p.result),
                                     p.schedule};
    launch<scaled_fp8_kernel<Config>>("sm90_scaled_fp8", {{"M", p.m}, {"N", p.n}, {"K", p.k}}, args, programs, Config::THREADS,
                                      Config::SHARED_BYTES, stream);
}

template <class Config>
ScaledFp8Variant scaled_fp8_variant() {
    return {Config::BLOCKS ? "block" : "row", Config::BM, Config::BN, SCALED_COLUMNS, Config::THREADS, Config::SHARED_BYTES,
            &launch_scaled_fp8<Config>};
}

}  // namespace quantlib::cuda

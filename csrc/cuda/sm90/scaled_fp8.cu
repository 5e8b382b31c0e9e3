// 16, 32 and 64 rows of x beside 128 of W as the A operand; 128 and 256 rows of x as the A operand.
#include "scaled_fp8_instances.h"

namespace quantlib::cuda {

template <bool BLOCKS>
void add_scaled_fp8(std::vector<ScaledFp8Variant>& found) {
    found.push_back(scaled_fp8_variant<ScaledFp8Config<true, 1, 16, BLOCKS>>());
    found.push_back(scaled_fp8_variant<ScaledFp8Config<true, 1, 32, BLOCKS>>());
    found.push_back(scaled_fp8_variant<ScaledFp8Config<true, 1, 64, BLOCKS>>());
    found.push_back(scaled_fp8_variant<ScaledFp8Config<false, 1, 128, BLOCKS>>());
    found.push_back(scaled_fp8_variant<ScaledFp8Config<false, 2, 128, BLOCKS>>());
}

std::vector<ScaledFp8Variant> all_scaled_fp8_variants() {
    std::vector<ScaledFp8Variant> found;
    add_scaled_fp8<true>(found);
    add_scaled_fp8<false>(found);
    return found;
}

}  // namespace quantlib::cuda

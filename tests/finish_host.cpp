// The epilogue's arithmetic (csrc/cuda/common/finish.h) on the CPU: fp32 sums -> the 16 bits that CUTLASS stores.
#include "finish.h"

// sum [n], alpha, bias [n] in 16 bits -> y [n] in 16 bits; n a multiple of 4.
extern "C" void finish(const float* sum, float alpha, const std::uint16_t* bias, std::uint16_t* y, int n, bool half) {
    using Fragment = cutlass::Array<float, 4>;
    const cutlass::NumericArrayConverter<cutlass::bfloat16_t, float, 4> store{};
    const cutlass::NumericArrayConverter<float, cutlass::bfloat16_t, 4> load{};
    for (int i = 0; i < n; i += 4) {
        Fragment sums, alphas;
        cutlass::Array<cutlass::bfloat16_t, 4> biases;
        for (int j = 0; j < 4; ++j) {
            sums[j] = sum[i + j];
            alphas[j] = alpha;
            biases[j] = cutlass::bfloat16_t::bitcast(bias[i + j]);
        }
        const auto stored = store(quantlib::cuda::Finish<Fragment>{}(sums, alphas, load(biases), {half}));
        for (int j = 0; j < 4; ++j) y[i + j] = cutlass::bfloat16_t(stored[j]).raw();
    }
}

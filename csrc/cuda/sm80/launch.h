// Launching a kernel, on a GPU or in the emulator.
#pragma once

#include <atomic>

#include "../common/check.h"
#include "../common/device.h"

namespace quantlib::cuda {

// KERNEL: a __global__ function of one argument. Raises CudaError with `name` and `shape` where CUDA refuses.
template <auto KERNEL, class Arguments>
void launch(const char* name, std::initializer_list<Size> shape, const Arguments& arguments, int programs, int threads,
            int shared_bytes, [[maybe_unused]] void* stream) {
#ifdef QUANTLIB_SIMT
    simt::launch({programs}, threads, shared_bytes, [&] { KERNEL(arguments); });
    (void)name, (void)shape;
#else
    // More than 48 KB of shared memory must be asked for once per device.
    static std::atomic<uint64_t> asked{0};
    int device = 0;
    check(cudaGetDevice(&device), name, shape);
    const uint64_t bit = uint64_t(1) << (device % 64);
    if ((asked.load(std::memory_order_relaxed) & bit) == 0) {
        check(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name, shape);
        asked.fetch_or(bit, std::memory_order_relaxed);
    }
    KERNEL<<<programs, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
    check_launch(name, shape);
#endif
}

}  // namespace quantlib::cuda

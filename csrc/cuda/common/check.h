// Errors of the CUDA runtime as C++ exceptions that name the kernel and the shape. bindings.cpp gives them to Python.
//
//     check(cudaFuncSetAttribute(...), "sm80_gemv");
//     gemv<<<grid, threads, bytes, stream>>>(...);
//     check_launch("sm80_gemv", {{"M", m}, {"N", n}, {"K", k}});
//
// Words are put together only when something failed: a check costs a comparison.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#ifndef QUANTLIB_SIMT
#include <cuda_runtime_api.h>
#endif

namespace quantlib::cuda {

// One size of a problem, such as {"M", 16}.
struct Size {
    const char* name;
    long long value;
};

// "M=16, N=4096, K=4096"
inline std::string in_words(std::initializer_list<Size> shape) {
    std::string words;
    for (const Size& size : shape) {
        words += (words.empty() ? "" : ", ") + std::string(size.name) + "=" + std::to_string(size.value);
    }
    return words;
}

// A call that CUDA, or a library on it, refused. `code` is the runtime's number, 0 where the refusal is not the runtime's.
class CudaError : public std::runtime_error {
   public:
    explicit CudaError(const std::string& message) : std::runtime_error(message) {}
    CudaError(const std::string& kernel, std::string shape, std::string reason, int code)
        : std::runtime_error(kernel + (shape.empty() ? "" : "(" + shape + ")") + ": " + reason),
          kernel(kernel),
          shape(std::move(shape)),
          reason(std::move(reason)),
          code(code) {}

    std::string kernel, shape, reason;
    int code = 0;
};

#ifndef QUANTLIB_SIMT

[[noreturn]] inline void fail(cudaError_t status, const char* kernel, std::initializer_list<Size> shape) {
    const std::string reason = std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
    throw CudaError(kernel, in_words(shape), reason, static_cast<int>(status));
}

// What a call of the runtime returned. `kernel`: the launcher, or the function, that made the call.
inline void check(cudaError_t status, const char* kernel, std::initializer_list<Size> shape = {}) {
    if (status != cudaSuccess) {
        cudaGetLastError();  // an error that can be got over is not reported once more, to whoever asks next
        fail(status, kernel, shape);
    }
}

// Directly after <<<...>>>: whether the launch was taken. Faults while a kernel runs come up at a later call.
inline void check_launch(const char* kernel, std::initializer_list<Size> shape) { check(cudaGetLastError(), kernel, shape); }

#endif

}  // namespace quantlib::cuda

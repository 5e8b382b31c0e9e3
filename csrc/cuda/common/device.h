// What a kernel may use of CUDA's execution model. The same kernel compiles by nvcc for a GPU and, with QUANTLIB_SIMT, by g++
// for the emulator (tests/simt), which runs it on the CPU and turns races, missing waits and stray addresses into errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef QUANTLIB_SIMT
#include "simt.h"
#define QL_DEVICE inline
#define QL_KERNEL(threads, min_blocks) inline void
#define QL_UNROLL
#define QL_NO_UNROLL
#define QL_GRID_CONSTANT
// Marks the steady state of a thread's main loop: shared-memory accesses in between are counted apart.
#define QL_STEADY(on) ::simt::steady(on)
#else
#define QL_DEVICE __device__ __forceinline__
// Written in place of the return type: QL_KERNEL(256, 1) name(arguments) { ... }
#define QL_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)
#define QL_UNROLL _Pragma("unroll")
#define QL_NO_UNROLL _Pragma("unroll 1")
// For arguments whose address an instruction takes (tensor maps): they must stay in the constant bank.
#define QL_GRID_CONSTANT __grid_constant__
#define QL_STEADY(on)
#endif

namespace quantlib::cuda {

// Where in the source an instruction stands, which the emulator names in its errors. Empty, and free, on a GPU.
#ifdef QUANTLIB_SIMT
using Site = simt::Site;
#else
struct Site {
    QL_DEVICE static constexpr Site current() { return {}; }
};
#endif

// The two 16-bit number types. Their values travel as bit patterns, two in a uint32_t, the low half first.
struct Half {};
struct Bf16 {};

// The carriers of 4, 8 and 16 bytes: one instruction moves each, at an address aligned to its size.
struct alignas(4) Words1 {
    uint32_t w[1];
};
struct alignas(8) Words2 {
    uint32_t w[2];
};
struct alignas(16) Words4 {
    uint32_t w[4];
};

constexpr int WARP = 32;

// Blocks are one row of threads.
#ifdef QUANTLIB_SIMT
QL_DEVICE int thread() { return simt::machine.thread; }
QL_DEVICE int block_threads() { return simt::machine.threads; }
QL_DEVICE int block_x() { return simt::machine.block.x; }
QL_DEVICE int block_y() { return simt::machine.block.y; }
QL_DEVICE int block_z() { return simt::machine.block.z; }
QL_DEVICE int grid_x() { return simt::machine.grid.x; }
QL_DEVICE int grid_y() { return simt::machine.grid.y; }
QL_DEVICE int grid_z() { return simt::machine.grid.z; }
QL_DEVICE std::byte* shared_memory() { return simt::machine.shared; }
#else
QL_DEVICE int thread() { return int(threadIdx.x); }
QL_DEVICE int block_threads() { return int(blockDim.x); }
QL_DEVICE int block_x() { return int(blockIdx.x); }
QL_DEVICE int block_y() { return int(blockIdx.y); }
QL_DEVICE int block_z() { return int(blockIdx.z); }
QL_DEVICE int grid_x() { return int(gridDim.x); }
QL_DEVICE int grid_y() { return int(gridDim.y); }
QL_DEVICE int grid_z() { return int(gridDim.z); }
// The block's dynamic shared memory. 1024 bytes: the 128-byte swizzle of tensor copies repeats at that distance.
QL_DEVICE std::byte* shared_memory() {
    extern __shared__ __align__(1024) unsigned char quantlib_shared[];
    return reinterpret_cast<std::byte*>(quantlib_shared);
}
#endif

// Every thread of the block arrives before any goes on; what each wrote before is seen by all after.
QL_DEVICE void sync_threads([[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::sync_threads(site);
#else
    __syncthreads();
#endif
}

// The same among the 32 lanes of a warp. Shuffles, ldmatrix and mma also meet, but order no memory.
QL_DEVICE void sync_warp([[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::sync_warp(site);
#else
    __syncwarp();
#endif
}

// Writes before the fence are seen by every block before the thread's writes after it.
QL_DEVICE void thread_fence() {
#ifndef QUANTLIB_SIMT
    __threadfence();
#endif
}

}  // namespace quantlib::cuda

// Hopper's instructions (sm_90a): barriers in shared memory, bulk and tensor copies that report to them, products of a
// warpgroup.
//
//     producer (one thread)                                   consumers (warpgroups of 128 threads)
//     barrier_wait(empty + s, parity ^ 1)                     barrier_wait(full + s, parity)
//     barrier_expect(full + s, bytes)                         wgmma_fence(), wgmma_m64k16(...), wgmma_commit(), wgmma_wait<0>()
//     copy_tensor(stage s, map, column, row, full + s)        barrier_arrive(empty + s)
#pragma once

#include "ptx.h"
#include "tensor_map.h"

#ifdef QUANTLIB_SIMT
#include "simt90.h"
#else
#include "wgmma_operands.h"
#endif

namespace quantlib::cuda {

// Barriers

// 8 bytes of shared memory that only the functions below touch. Its phases are numbered from 0; one ends when all arrivals that
// barrier_init announced have come, and all bytes that barrier_expect announced.
using Barrier = uint64_t;

// One thread prepares a barrier for phases of `arrivals` arrivals each.
QL_DEVICE void barrier_init(Barrier* barrier, int arrivals, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::barrier_init(barrier, arrivals, site);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// By the thread that prepared barriers, after the last: copies then find them. Other threads see them after sync_threads.
QL_DEVICE void barrier_init_fence() {
#ifdef QUANTLIB_SIMT
    simt::barrier_init_fence();
#else
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Arrives: what the thread wrote and read before is ordered before everything after a wait for this phase.
QL_DEVICE void barrier_arrive(Barrier* barrier, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::barrier_arrive(barrier, 0, site);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(detail::shared_address(barrier)) : "memory");
#endif
}

// Arrives, and announces that copies will bring `bytes` in this phase.
QL_DEVICE void barrier_expect(Barrier* barrier, int bytes, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::barrier_arrive(barrier, bytes, site);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(detail::shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

// Waits for the end of the phase whose number is odd (parity 1) or even (0): the current one or the one before. On a fresh
// barrier parity 1 doesn't wait, which is how a producer finds its stages empty at first.
QL_DEVICE void barrier_wait(Barrier* barrier, int parity, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::barrier_wait(barrier, parity, site);
#else
    // The instruction itself sleeps for a while before it gives up.
    uint32_t done = 0;
    while (done == 0) {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n"
            "}\n"
            : "=r"(done)
            : "r"(detail::shared_address(barrier)), "r"(parity)
            : "memory");
    }
#endif
}

// The barrier of `threads` threads, a multiple of 32, among themselves: `id` is 1..15, sync_threads has 0.
QL_DEVICE void sync_group(int id, int threads, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::sync_group(id, threads, site);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// What this thread wrote to shared memory by ordinary stores and copy_async is seen by wgmma and bulk copies after a barrier.
QL_DEVICE void fence_proxy_async() {
#ifdef QUANTLIB_SIMT
    simt::fence_proxy_async();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Copies

// By one thread: copies `bytes`, a multiple of 16 as both addresses, and reports them to the barrier's current phase.
QL_DEVICE void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier,
                         [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::copy_bulk(shared, global, bytes, barrier, site);
#else
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :
        : "r"(detail::shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes),
          "r"(detail::shared_address(barrier))
        : "memory");
#endif
}

// By one thread: copies the map's box that begins at (row, column), in elements; either may lie outside, and what does arrives
// as zeros. All bytes of the box are reported. `shared` is a multiple of 128 bytes, of 1024 if the map swizzles.
QL_DEVICE void copy_tensor(void* shared, const TensorMap& map, int column, int row, Barrier* barrier,
                           [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::copy_tensor(shared, map, column, row, barrier, site);
#else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :
        : "r"(detail::shared_address(shared)), "l"(&map), "r"(column), "r"(row), "r"(detail::shared_address(barrier))
        : "memory");
#endif
}

// Products of a warpgroup

// Where wgmma finds an operand in shared memory: N rows of B (its columns) or 64 rows of A, 128 bytes of each along K, swizzled
// as Swizzle::bytes128, eight rows to 1024 bytes. `tile` is a multiple of 1024. Bits 0..13: address / 16; 32..45: distance of
// groups of eight rows / 16; 62: the swizzle; 16..29, the distance along K, counts only where rows are wider than the swizzle.
QL_DEVICE uint64_t wgmma_descriptor(const void* tile) {
#ifdef QUANTLIB_SIMT
    const uint64_t address = simt::shared_offset(tile);
#else
    const uint64_t address = detail::shared_address(tile);
#endif
    return (address & 0x3FFFF) >> 4 | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// The same operand, further along K by `columns` numbers of BYTES bytes, in steps of 32 bytes below 128: the swizzle applies
// after the addition.
template <int BYTES = 2>
QL_DEVICE uint64_t wgmma_advance(uint64_t descriptor, int columns) {
    return descriptor + uint64_t(columns * BYTES >> 4);
}

// Before the first wgmma of a sequence, and after registers that one reads were written. By all 128 threads, as all that
// follows.
QL_DEVICE void wgmma_fence([[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::wgmma_fence(site);
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the group of the wgmmas since the last commit.
QL_DEVICE void wgmma_commit([[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::wgmma_commit(site);
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most the LAST youngest groups are under way. Until then nobody touches their sums, their A registers or their
// B.
template <int LAST>
QL_DEVICE void wgmma_wait([[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::wgmma_wait(LAST, site);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LAST) : "memory");
#endif
}

// The compiler doesn't know that wgmma writes its sums later: it must not move them to other registers meanwhile. Stands before
// the fence and after the wait.
template <int COUNT>
QL_DEVICE void wgmma_hold([[maybe_unused]] float (&d)[COUNT]) {
#ifndef QUANTLIB_SIMT
    QL_UNROLL
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

#ifndef QUANTLIB_SIMT
namespace detail {

// 1: add to d; 1, 1: neither factor negated; 0: B lies along K
#define QL_WGMMA(N, SUMS, TYPE, A0, A1, A2, A3, B)                                                                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" QL_WGMMA_NAMES_##SUMS "}, {%" #A0    \
                 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 1, 1, 1, 0;"                                                   \
                 : QL_WGMMA_SUMS_##SUMS                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor))

#define QL_WGMMA_FOR(N, SUMS, A0, A1, A2, A3, B)                                                          \
    template <class T>                                                                                    \
    QL_DEVICE void wgmma(float (&d)[SUMS], const uint32_t (&a)[4], uint64_t descriptor) {                 \
        if constexpr (IS_HALF<T>) {                                                                       \
            QL_WGMMA(N, SUMS, "f16", A0, A1, A2, A3, B);                                                  \
        } else {                                                                                          \
            QL_WGMMA(N, SUMS, "bf16", A0, A1, A2, A3, B);                                                 \
        }                                                                                                 \
    }

QL_WGMMA_FOR(16, 8, 8, 9, 10, 11, 12)
QL_WGMMA_FOR(32, 16, 16, 17, 18, 19, 20)
QL_WGMMA_FOR(64, 32, 32, 33, 34, 35, 36)
QL_WGMMA_FOR(128, 64, 64, 65, 66, 67, 68)

#undef QL_WGMMA_FOR
#undef QL_WGMMA

}  // namespace detail
#endif

// d += a b with a 64 x 16 in registers and b 16 x N in shared memory, N of {16, 32, 64, 128}; starts it, see wgmma_wait. Warp w
// of the warpgroup holds rows 16 w to 16 w + 15 of a and d, as for mma_16816: d[4 j .. 4 j + 3] are the sums of columns 8 j to
// 8 j + 7.
template <class T, int N>
QL_DEVICE void wgmma_m64k16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t descriptor,
                            [[maybe_unused]] Site site = Site::current()) {
    static_assert(N == 16 || N == 32 || N == 64 || N == 128);
#ifdef QUANTLIB_SIMT
    simt::wgmma(simt::kind_of<IS_HALF<T>>(), N, d, a, descriptor, site);
#else
    detail::wgmma<T>(d, a, descriptor);
#endif
}

// Warps

// True for one lane of the warp, always the same. All 32 lanes take part.
QL_DEVICE bool elect([[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    return simt::elect(site);
#else
    uint32_t chosen;
    asm volatile(
        "{\n"
        ".reg .pred chosen;\n"
        "elect.sync _|chosen, 0xFFFFFFFF;\n"
        "selp.u32 %0, 1, 0, chosen;\n"
        "}\n"
        : "=r"(chosen));
    return chosen != 0;
#endif
}

// A warpgroup gives registers back, down to COUNT a thread, or takes them. All threads of it, in a kernel with QL_KERNEL's
// bounds.
template <int COUNT>
QL_DEVICE void registers_release() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
#ifndef QUANTLIB_SIMT
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

template <int COUNT>
QL_DEVICE void registers_take() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
#ifndef QUANTLIB_SIMT
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

}  // namespace quantlib::cuda

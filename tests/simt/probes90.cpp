// As probes.cpp, for Hopper's instructions. `mistake` names what a kernel leaves out; with "" it must work.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "ptx90.h"
#include "sm90/wgmma_e4m3.h"

using namespace quantlib::cuda;
namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

TensorMap map_of(uintptr_t base, int rows, int columns, int row_bytes, int element_bytes, int box_rows, int box_columns,
                 bool swizzle) {
    return make_tensor_map({pointer<void>(base), rows, columns, row_bytes, element_bytes}, box_rows, box_columns,
                           swizzle ? Swizzle::bytes128 : Swizzle::none);
}

// The first bytes of shared memory, by all threads.
void show(int bytes, uintptr_t out) {
    for (int i = thread(); i < bytes; i += block_threads()) {
        store_global(pointer<std::byte>(out) + i, load_shared<std::byte>(shared_memory() + i));
    }
}

// Shared memory as the copy leaves it.
void tensor_copy(const TensorMap& map, int column, int row, uintptr_t out) {
    const int bytes = map.box_rows * map.box_columns * map.element_bytes;
    simt::launch({}, 64, bytes + 8, [&] {
        Barrier* full = reinterpret_cast<Barrier*>(shared_memory() + bytes);
        if (thread() == 0) {
            barrier_init(full, 1);
            barrier_init_fence();
            barrier_expect(full, bytes);
            copy_tensor(shared_memory(), map, column, row, full);
        }
        sync_threads();
        barrier_wait(full, 0);
        show(bytes, out);
    });
}

void bulk_copy(uintptr_t from, uintptr_t to, int bytes) {
    simt::launch({}, 32, bytes + 8, [&] {
        Barrier* full = reinterpret_cast<Barrier*>(shared_memory() + bytes);
        if (elect()) {
            barrier_init(full, 1);
            barrier_init_fence();
            barrier_expect(full, bytes);
            copy_bulk(shared_memory(), pointer<std::byte>(from), bytes, full);
        }
        sync_warp();
        barrier_wait(full, 0);
        show(bytes, to);
    });
}

// d[128][N / 2] += a[steps][128][4] times B, whose N rows of 64 numbers a tensor copy brings
template <class T, int N>
void wgmma_kernel(const TensorMap& map, const uint32_t* a, float* d, int steps) {
    Barrier* full = reinterpret_cast<Barrier*>(shared_memory() + N * 128);
    if (thread() == 0) {
        barrier_init(full, 1);
        barrier_init_fence();
        barrier_expect(full, N * 128);
        copy_tensor(shared_memory(), map, 0, 0, full);
    }
    sync_threads();
    barrier_wait(full, 0);
    float sums[N / 2];
    uint32_t operands[4][4];
    for (int i = 0; i < N / 2; ++i) sums[i] = load_global<float>(d + thread() * (N / 2) + i);
    for (int k = 0; k < steps; ++k) {
        for (int i = 0; i < 4; ++i) operands[k][i] = load_global<uint32_t>(a + (k * 128 + thread()) * 4 + i);
    }
    const uint64_t descriptor = wgmma_descriptor(shared_memory());
    wgmma_hold(sums);
    wgmma_fence();
    for (int k = 0; k < steps; ++k) wgmma_m64k16<T, N>(sums, operands[k], wgmma_advance(descriptor, 16 * k));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(sums);
    for (int i = 0; i < N / 2; ++i) store_global(d + thread() * (N / 2) + i, sums[i]);
}

template <class T>
void wgmma_for(int n, const TensorMap& map, uintptr_t a, uintptr_t d, int steps) {
    const auto kernel = n == 16   ? wgmma_kernel<T, 16>
                        : n == 32 ? wgmma_kernel<T, 32>
                        : n == 64 ? wgmma_kernel<T, 64>
                                  : wgmma_kernel<T, 128>;
    simt::launch({}, 128, n * 128 + 8, [&] { kernel(map, pointer<uint32_t>(a), pointer<float>(d), steps); });
}

void wgmma(bool half, int n, const TensorMap& map, uintptr_t a, uintptr_t d, int steps) {
    half ? wgmma_for<Half>(n, map, a, d, steps) : wgmma_for<Bf16>(n, map, a, d, steps);
}

// d[128][N / 2] += A B^T, or = where not `add`: A [64][128] and B [N][128] of E4M3 by tensor copies, the first 32 columns times
// `steps` of them.
template <int N>
void wgmma_e4m3_kernel(const TensorMap& a, const TensorMap& b, float* d, int steps, bool add, const std::string& mistake) {
    const auto is = [&](const char* name) { return mistake == name; };
    std::byte *a_tile = shared_memory(), *b_tile = a_tile + 64 * 128;
    Barrier* full = reinterpret_cast<Barrier*>(b_tile + N * 128);
    if (thread() == 0) {
        barrier_init(full, 1);
        barrier_init_fence();
    }
    sync_threads();
    if (thread() == 0) {
        barrier_expect(full, (64 + N) * 128);
        copy_tensor(a_tile, a, 0, 0, full);
        copy_tensor(b_tile, b, 0, 0, full);
    }
    if (!is("no wait for the copies")) barrier_wait(full, 0);
    float sums[N / 2];
    for (int i = 0; i < N / 2; ++i) sums[i] = load_global<float>(d + thread() * (N / 2) + i);
    const uint64_t a_first = wgmma_descriptor(is("descriptors differ") ? a_tile + 1024 * (thread() / 64) : a_tile);
    const uint64_t b_first = wgmma_descriptor(b_tile);
    wgmma_hold(sums);
    wgmma_fence();
    for (int k = 0; k < steps; ++k) {
        const uint64_t a_step = wgmma_advance<1>(a_first, 32 * k), b_step = wgmma_advance<1>(b_first, 32 * k);
        if (k == 0 && !add) {
            wgmma_e4m3<false, N>(sums, a_step, b_step);
        } else {
            wgmma_e4m3<true, N>(sums, a_step, b_step);
        }
    }
    wgmma_commit();
    if (is("A overwritten") && thread() == 5) store_shared(a_tile + 4 * thread(), uint32_t(0));
    wgmma_wait<0>();
    wgmma_hold(sums);
    for (int i = 0; i < N / 2; ++i) store_global(d + thread() * (N / 2) + i, sums[i]);
}

void wgmma_e4m3_for(int n, const TensorMap& a, const TensorMap& b, uintptr_t d, int steps, bool add,
                    const std::string& mistake) {
    const auto kernel = n == 16   ? wgmma_e4m3_kernel<16>
                        : n == 32 ? wgmma_e4m3_kernel<32>
                        : n == 64 ? wgmma_e4m3_kernel<64>
                                  : wgmma_e4m3_kernel<128>;
    simt::launch({}, 128, (64 + n) * 128 + 8, [&] { kernel(a, b, pointer<float>(d), steps, add, mistake); });
}

// y[128 G][N] = w[K / 16][128 G][4] x[N][K]^T with G consumer warpgroups and one producer warp, three stages of 64 columns.
// Sums are left in the order of the accumulators.
template <int N, int GROUPS>
void pipeline_kernel(const TensorMap& x, const uint32_t* w, float* y, int k, const std::string& mistake) {
    constexpr int STAGES = 3, STAGE_BYTES = N * 128, CONSUMERS = GROUPS * 128;
    const auto is = [&](const char* name) { return mistake == name; };
    std::byte* stages = shared_memory();
    Barrier* full = reinterpret_cast<Barrier*>(stages + STAGES * STAGE_BYTES);
    Barrier* empty = full + STAGES;
    if (thread() == CONSUMERS) {
        for (int s = 0; s < STAGES; ++s) barrier_init(full + s, 1), barrier_init(empty + s, CONSUMERS);
        if (!is("no init fence")) barrier_init_fence();
    }
    if (!is("no sync after init")) sync_threads();
    if (thread() >= CONSUMERS) {
        registers_release<40>();
        if (!elect()) return;
        for (int step = 0; step < k / 64; ++step) {
            const int s = step % STAGES, parity = step / STAGES % 2;
            if (!is("no wait for empty")) barrier_wait(empty + s, parity ^ 1);
            barrier_expect(full + s, STAGE_BYTES + (is("too many bytes") ? 16 : is("too few bytes") ? -16 : 0));
            copy_tensor(stages + s * STAGE_BYTES, x, 64 * step, 0, full + s);
        }
        return;
    }
    registers_take<200>();
    float sums[N / 2] = {};
    uint32_t a[4][4];
    for (int step = 0; step < k / 64; ++step) {
        const int s = step % STAGES, parity = step / STAGES % 2;
        for (int i = 0; i < 4; ++i) {
            const Words4 words = load_global<Words4>(w + ((4 * step + i) * CONSUMERS + thread()) * 4);
            for (int r = 0; r < 4; ++r) a[i][r] = words.w[r];
        }
        if (!is("no wait for full")) barrier_wait(full + s, is("wrong parity") ? parity ^ 1 : parity);
        if (is("no wait by one lane") && thread() == 37) sums[0] = load_shared<float>(stages + s * STAGE_BYTES);
        if (!is("no wgmma_fence")) wgmma_fence();
        for (int i = 0; i < 4; ++i) {
            if (is("A written after the fence") && step == 1) a[i][0] = 0;
            if (is("one warp missing") && thread() / 32 == 2) continue;
            wgmma_m64k16<Half, N>(sums, a[i], wgmma_advance(wgmma_descriptor(stages + s * STAGE_BYTES), 16 * i));
        }
        if (!is("no wgmma_commit")) wgmma_commit();
        if (is("A written before the wait")) a[0][0] = 0;
        if (is("sums touched")) sums[1] = 0;
        if (is("released before the wait")) barrier_arrive(empty + s);
        if (!is("no wgmma_wait")) wgmma_wait<0>();
        if (!is("released before the wait")) barrier_arrive(empty + s);
        if (is("two arrivals")) barrier_arrive(empty + s);
        if (is("touches a barrier")) store_shared(full, uint64_t(0));
    }
    for (int i = 0; i < N / 2; ++i) store_global(y + thread() * (N / 2) + i, sums[i]);
}

void pipeline(const TensorMap& x, uintptr_t w, uintptr_t y, int k, const std::string& mistake) {
    simt::launch({}, 288, 3 * 32 * 128 + 48, [&] {
        pipeline_kernel<32, 2>(x, pointer<uint32_t>(w), pointer<float>(y), k, mistake);
    });
}

// B written by ordinary stores, or by copies that a thread waits for; all threads store the same matrix of ones
void stored_b(bool fence, bool meet, bool by_copy, uintptr_t ones, uintptr_t y) {
    simt::launch({}, 128, 16 * 128, [&] {
        std::byte* own = shared_memory() + 16 * thread();
        if (by_copy) {
            copy_async<16>(own, pointer<Words4>(ones) + thread(), true);
            copy_async_commit();
            copy_async_wait<0>();
        } else {
            store_shared(own, load_global<Words4>(pointer<Words4>(ones) + thread()));
        }
        if (fence) fence_proxy_async();
        if (meet) sync_group(1, 128);
        float sums[8] = {};
        const uint32_t a[4] = {0x3C003C00, 0x3C003C00, 0x3C003C00, 0x3C003C00};
        wgmma_fence();
        wgmma_m64k16<Half, 16>(sums, a, wgmma_descriptor(shared_memory()));
        wgmma_commit();
        wgmma_wait<0>();
        for (int i = 0; i < 8; ++i) store_global(pointer<float>(y) + 8 * thread() + i, sums[i]);
    });
}

// Two groups of products under way on two sets of sums: the first may be used while the second runs, and not the other way
// round.
void two_groups(bool patient, uintptr_t ones, uintptr_t y) {
    simt::launch({}, 128, 16 * 128, [&] {
        store_shared(shared_memory() + 16 * thread(), load_global<Words4>(pointer<Words4>(ones) + thread()));
        fence_proxy_async();
        sync_threads();
        float first[8] = {}, second[8] = {};
        const uint32_t a[4] = {0x3C003C00, 0x3C003C00, 0x3C003C00, 0x3C003C00};
        const uint64_t b = wgmma_descriptor(shared_memory());
        wgmma_fence();
        wgmma_m64k16<Half, 16>(first, a, b);
        wgmma_commit();
        wgmma_fence();
        wgmma_m64k16<Half, 16>(second, a, b);
        wgmma_commit();
        wgmma_wait<1>();
        if (patient) wgmma_wait<0>();
        for (int i = 0; i < 8; ++i) store_global(pointer<float>(y) + 8 * thread() + i, first[i] + second[i]);
        wgmma_wait<0>();
    });
}

// Warps 0 and 1 exchange values by a barrier of their own while warp 2 does something else.
void groups(int waits, uintptr_t out) {
    simt::launch({}, 96, 256, [&] {
        if (thread() >= 64) return;
        store_shared(shared_memory() + 4 * thread(), thread());
        if (waits != 0) sync_group(3, waits);
        store_global(pointer<int>(out) + thread(), load_shared<int>(shared_memory() + 4 * (63 - thread())));
    });
}

// Two copies with a barrier each: who waits for one has not waited for the other.
void two_barriers(bool waits_for_both, uintptr_t from, uintptr_t to) {
    simt::launch({}, 64, 144, [&] {
        Barrier* full = reinterpret_cast<Barrier*>(shared_memory() + 128);
        if (thread() == 0) {
            for (int i = 0; i < 2; ++i) barrier_init(full + i, 1);
            barrier_init_fence();
        }
        sync_threads();
        if (thread() == 0) {
            for (int i = 0; i < 2; ++i) {
                barrier_expect(full + i, 64);
                copy_bulk(shared_memory() + 64 * i, pointer<std::byte>(from) + 64 * i, 64, full + i);
            }
        }
        if (thread() != 32) return;
        barrier_wait(full, 0);
        if (waits_for_both) barrier_wait(full + 1, 0);
        for (int i = 0; i < 32; ++i) store_global(pointer<int>(to) + i, load_shared<int>(shared_memory() + 4 * i));
    });
}

}  // namespace

PYBIND11_MODULE(simt_probes90, m) {
    simt::bind(m);
    py::class_<TensorMap>(m, "TensorMap", py::module_local());
    m.def("map_of", &map_of);
    m.def("tensor_copy", &tensor_copy);
    m.def("bulk_copy", &bulk_copy);
    m.def("wgmma", &wgmma);
    m.def("wgmma_e4m3", &wgmma_e4m3_for);
    m.def("pipeline", &pipeline);
    m.def("stored_b", &stored_b);
    m.def("two_groups", &two_groups);
    m.def("groups", &groups);
    m.def("two_barriers", &two_barriers);
}

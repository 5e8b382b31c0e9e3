// Small kernels that tests/test_simt.py runs: one instruction each with its results laid open, and one mistake each.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "ptx.h"

using namespace quantlib::cuda;
namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Instructions

// out[t] of 16-bit pairs a, b, c by the name of the function
template <class T>
void arithmetic_kernel(const std::string& name, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out,
                       int count) {
    const int i = block_x() * block_threads() + thread();
    if (i >= count) return;
    const uint32_t x = load_global<uint32_t>(a + i), y = load_global<uint32_t>(b + i), z = load_stream<uint32_t>(c + i);
    uint32_t result = 0;
    if (name == "fma2") result = fma2<T>(x, y, z);
    if (name == "mul2") result = mul2<T>(x, y);
    if (name == "add2") result = add2<T>(x, y);
    if (name == "sub2") result = sub2<T>(x, y);
    if (name == "pack2") result = pack2<T>(simt::same_bits<float>(x), simt::same_bits<float>(y));
    if (name == "low") result = simt::same_bits<uint32_t>(low<T>(x));
    if (name == "high") result = simt::same_bits<uint32_t>(high<T>(x));
    if (name == "prmt") result = prmt(x, y, z);
    if (name == "lop3_and_or") result = lop3<(0xF0 & 0xCC) | 0xAA>(x, y, z);
    if (name == "lop3_xor") result = lop3<0xF0 ^ 0xCC ^ 0xAA>(x, y, z);
    store_global(out + i, result);
}

void arithmetic(const std::string& name, bool half, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t out, int count) {
    const auto kernel = half ? arithmetic_kernel<Half> : arithmetic_kernel<Bf16>;
    simt::launch({(count + 255) / 256}, 256, 0, [&] {
        kernel(name, pointer<uint32_t>(a), pointer<uint32_t>(b), pointer<uint32_t>(c), pointer<uint32_t>(out), count);
    });
}

// 32 rows of 16 bytes go to shared memory; out[lane][i] is what register i holds
void load_matrix(const std::string& name, uintptr_t rows, uintptr_t out) {
    simt::launch({}, 32, 512, [&] {
        std::byte* row = shared_memory() + 16 * thread();
        store_shared(row, load_global<Words4>(pointer<Words4>(rows) + thread()));
        sync_warp();
        uint32_t r[4] = {};
        uint32_t two[2] = {};
        if (name == "x4") load_matrix_x4(r, row);
        if (name == "trans_x4") load_matrix_trans_x4(r, row);
        if (name == "x2") load_matrix_x2(two, row);
        if (name == "trans_x2") load_matrix_trans_x2(two, row);
        if (name == "x2" || name == "trans_x2") r[0] = two[0], r[1] = two[1];
        for (int i = 0; i < 4; ++i) store_global(pointer<uint32_t>(out) + 4 * thread() + i, r[i]);
    });
}

// a[lane][4], b[lane][2], d[lane][4]: the registers themselves
template <class T>
void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
    uint32_t my_a[4], my_b[2];
    float my_d[4];
    for (int i = 0; i < 4; ++i) my_a[i] = load_global<uint32_t>(a + 4 * thread() + i);
    for (int i = 0; i < 2; ++i) my_b[i] = load_global<uint32_t>(b + 2 * thread() + i);
    for (int i = 0; i < 4; ++i) my_d[i] = load_global<float>(d + 4 * thread() + i);
    mma_16816<T>(my_d, my_a, my_b);
    for (int i = 0; i < 4; ++i) store_global(d + 4 * thread() + i, my_d[i]);
}

void mma(bool half, uintptr_t a, uintptr_t b, uintptr_t d) {
    const auto kernel = half ? mma_kernel<Half> : mma_kernel<Bf16>;
    simt::launch({}, 32, 0, [&] { kernel(pointer<uint32_t>(a), pointer<uint32_t>(b), pointer<float>(d)); });
}

// out[t] = value of lane t + 1, then of lane t ^ 5, as floats
void shuffles(uintptr_t out) {
    simt::launch({}, 64, 0, [&] {
        const float next = shuffle(float(thread()), (thread() + 1) % 32), other = shuffle_xor(float(thread()), 5);
        store_global(pointer<float>(out) + 2 * thread(), next);
        store_global(pointer<float>(out) + 2 * thread() + 1, other);
    });
}

// Every block writes 64 numbers, one a thread, and the last to arrive adds up all of them. out: sum, the last block
void meeting(uintptr_t counter, uintptr_t partial, uintptr_t out, int blocks, const std::string& mistake) {
    simt::launch({blocks}, 64, 4, [&] {
        int* numbers = pointer<int>(partial);
        store_global(numbers + 64 * block_x() + thread(), 1 << block_x());
        if (mistake != "no barrier before the counter") sync_threads();
        if (thread() == 0) {
            const int before = mistake == "no counter" ? blocks - 1 : add_acquire_release(pointer<int>(counter), 1);
            store_shared(shared_memory(), before);
        }
        if (mistake == "no barrier after the counter") {
            if (thread() != 1 || load_global<int>(pointer<int>(counter)) != blocks) return;
        } else {
            sync_threads();
            if (load_shared<int>(shared_memory()) != blocks - 1 || thread() != 1) return;
        }
        int sum = 0;
        for (int i = 0; i < 64 * blocks; ++i) {
            sum += mistake == "by the constant path" ? load_stream<int>(numbers + i) : load_global<int>(numbers + i);
        }
        store_global(pointer<int>(out), sum);
        store_global(pointer<int>(out) + 1, block_x());
    });
}

// Two blocks, or two threads of a block, write the same number.
void double_write(uintptr_t out, int blocks, bool barrier) {
    simt::launch({blocks}, 32, 0, [&] {
        if (thread() == 0) store_global(pointer<int>(out), 1);
        if (barrier) sync_threads();
        if (blocks == 1 && thread() == 1) store_global(pointer<int>(out), 2);
    });
}

// Thread t loads `bytes` at offset t * stride; a steady second pass
template <class V>
void pattern_kernel(int stride, int active) {
    for (int i = thread(); i < 4096; i += block_threads()) store_shared(shared_memory() + 4 * i, uint32_t(i));
    sync_threads();
    QL_STEADY(true);
    if (thread() < active) load_shared<V>(shared_memory() + thread() * stride);
    QL_STEADY(false);
}

void pattern(int bytes, int stride, int active) {
    const auto kernel = bytes == 16 ? pattern_kernel<Words4>
                        : bytes == 8 ? pattern_kernel<Words2>
                        : bytes == 4 ? pattern_kernel<Words1>
                                     : pattern_kernel<uint8_t>;
    simt::launch({}, 32, 16384, [&] { kernel(stride, active); });
}

void matrix_pattern(int stride) {
    simt::launch({}, 32, 16384, [&] {
        for (int i = thread(); i < 4096; i += 32) store_shared(shared_memory() + 4 * i, 0u);
        sync_threads();
        uint32_t r[4];
        QL_STEADY(true);
        load_matrix_x4(r, shared_memory() + thread() * stride);
    });
}

// `count` loads of each lane between two meetings of the warp
void long_run(int count) {
    simt::launch({}, 32, 128, [&] {
        store_shared(shared_memory() + 4 * thread(), 0);
        sync_warp();
        for (int i = 0; i < count; ++i) load_shared<int>(shared_memory() + 4 * thread());
    });
}

void speed(int rounds) {
    simt::launch({}, 256, 8192, [&] {
        std::byte* own = shared_memory() + 16 * thread();
        store_shared(own, Words4{});
        sync_threads();
        uint32_t a[4], b[2] = {};
        float d[4] = {};
        for (int r = 0; r < rounds; ++r) {
            const Words4 words = load_shared<Words4>(own);
            store_shared(own, words);
            sync_threads();
            load_matrix_x4(a, own);
            for (int i = 0; i < 4; ++i) mma_16816<Half>(d, a, b);
            sync_threads();
        }
    });
}

// Mistakes

// Every thread copies 16 bytes in each of `stages`, waits as told, and a neighbour reads stage 0.
template <int LAST>
void pipeline_kernel(const std::byte* from, std::byte* to, bool waits, bool meets, int reader_step) {
    for (int stage = 0; stage < 2; ++stage) {
        copy_async<16>(shared_memory() + 1024 * stage + 16 * thread(), from + 1024 * stage + 16 * thread(), true);
        copy_async_commit();
    }
    if (waits) copy_async_wait<LAST>();
    if (meets) sync_threads();
    const int other = (thread() + reader_step) % block_threads();
    for (int stage = 0; stage < 2; ++stage) {
        const Words4 words = load_shared<Words4>(shared_memory() + 1024 * stage + 16 * other);
        store_global(to + 1024 * stage + 16 * other, words);
    }
}

void pipeline(uintptr_t from, uintptr_t to, int last, bool waits, bool meets, int reader_step) {
    const auto kernel = last == 0 ? pipeline_kernel<0> : pipeline_kernel<1>;
    simt::launch({}, 64, 2048, [&] { kernel(pointer<std::byte>(from), pointer<std::byte>(to), waits, meets, reader_step); });
}

void mistake(const std::string& name, uintptr_t memory) {
    simt::launch({2, 1, 1}, 64, 1024, [&] {
        std::byte* own = shared_memory() + 4 * thread();
        std::byte* next = shared_memory() + 4 * ((thread() + 1) % 64);
        std::byte* global = pointer<std::byte>(memory);
        if (name == "shared beyond the end") store_shared(shared_memory() + 1024 - 4 + 4 * thread(), 1);
        if (name == "shared before the start") store_shared(shared_memory() - 4, 1);
        if (name == "shared misaligned") store_shared(shared_memory() + 2, 1);
        if (name == "unwritten") load_shared<int>(own);
        if (name == "half unwritten") store_shared(own, uint16_t(1)), load_shared<int>(own);
        if (name == "read before barrier") store_shared(own, 1), load_shared<int>(next);
        if (name == "read after sync_warp of another warp") store_shared(own, 1), sync_warp(), load_shared<int>(next);
        if (name == "write before barrier") store_shared(own, 1), store_shared(next, 1);
        if (name == "overwrite before barrier") {
            store_shared(own, 1);
            sync_threads();
            load_shared<int>(next);
            store_shared(own, 2);
        }
        if (name == "matrix before sync_warp") {
            for (int i = 0; i < 4; ++i) store_shared(shared_memory() + 16 * (thread() % 32) + 512 * (thread() / 32) + 4 * i, 1);
            uint32_t r[4];
            load_matrix_x4(r, shared_memory() + 16 * (thread() % 32) + 512 * (thread() / 32));
        }
        if (name == "matrix in flight" || name == "matrix of nothing") {
            if (name == "matrix in flight") copy_async<16>(shared_memory() + 16 * thread(), global, false), copy_async_commit();
            sync_threads();
            uint32_t r[4];
            load_matrix_x4(r, shared_memory() + 16 * thread());
        }
        if (name == "matrix misaligned" || name == "matrix beyond the end") {
            uint32_t r[4];
            load_matrix_x4(r, shared_memory() + (name == "matrix misaligned" ? 8 : 1024));
        }
        if (name == "global beyond the end") load_global<int>(global + 256);
        if (name == "global across the end") load_global<Words4>(global + 248);
        if (name == "global misaligned") load_global<Words4>(global + 8);
        if (name == "global null") load_global<int>(nullptr);
        if (name == "global write") store_global(global, 1);
        if (name == "copy beyond the end") copy_async<16>(shared_memory() + 16 * thread(), global + 256, true);
        if (name == "overwritten in flight") {
            copy_async<4>(own, global, false);
            copy_async_commit();
            store_shared(own, 1);
        }
        if (name == "two copies in flight") copy_async<4>(own, global, false), copy_async<4>(own, global, false);
        if (name == "uncommitted") copy_async<4>(own, global, false), copy_async_wait<0>(), load_shared<int>(own);
        if (name == "divergent barriers") {
            if (thread() < 32) {
                sync_threads();
            } else {
                sync_threads();
            }
        }
        if (name == "early end") {
            if (thread() == 7) return;
            sync_threads();
        }
        if (name == "late end") {
            if (thread() == 63) return;
            sync_threads();
        }
        if (name == "lane missing") {
            if (thread() != 5) shuffle_xor(1, 1);
        }
        if (name == "lane at a barrier") {
            if (thread() == 5) {
                sync_threads();
            } else {
                sync_warp();
            }
        }
        if (name == "warp torn apart") {
            if (thread() < 16) sync_warp();
            sync_threads();
        }
        if (name == "two collectives") {
            if (thread() % 2 != 0) {
                sync_warp();
            } else {
                shuffle_xor(1, 1);
            }
        }
        if (name == "shuffle from nowhere") shuffle(1, 32);
    });
}

}  // namespace

PYBIND11_MODULE(simt_probes, m) {
    simt::bind(m);
    m.def("arithmetic", &arithmetic);
    m.def("load_matrix", &load_matrix);
    m.def("mma", &mma);
    m.def("shuffles", &shuffles);
    m.def("meeting", &meeting);
    m.def("double_write", &double_write);
    m.def("pattern", &pattern);
    m.def("matrix_pattern", &matrix_pattern);
    m.def("long_run", &long_run);
    m.def("speed", &speed);
    m.def("pipeline", &pipeline);
    m.def("mistake", &mistake);
}

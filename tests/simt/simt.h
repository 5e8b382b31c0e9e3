// The emulator as kernels and launchers see it. A block's threads are fibers of one CPU thread, blocks run one after the other,
// and what a GPU would leave to chance is an error here: README.md says which mistakes are found and which are not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "arithmetic.h"

namespace simt {

using Site = std::source_location;

// Whatever the emulator found: the message names the thread, the block and the place in the kernel.
class Error : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Dim {
    int x = 1, y = 1, z = 1;
};

// In which order blocks run, and the warps and lanes of a block where several could.
enum class Order { forward, reverse, random };

constexpr int WARP = 32;

// The running thread's place, read by every kernel.
struct Machine {
    int thread = 0, threads = 0;
    Dim block, grid;
    std::byte* shared = nullptr;
};
extern Machine machine;

// Runs `kernel` once per thread: `launch({blocks}, threads, shared_bytes, [&] { kernel<...>(arguments); })`.
void launch(Dim grid, int threads, size_t shared_bytes, const std::function<void()>& kernel);

void set_order(Order order, uint64_t seed);

// Global memory that kernels may touch. Ranges must not overlap.
void allow(uintptr_t address, size_t bytes, const std::string& name, bool writable);
void forget(uintptr_t address);

// What device.h and ptx.h call

void steady(bool on);
void sync_threads(Site site);
void sync_warp(Site site);

void read_shared(void* to, const void* from, size_t bytes, Site site);
void write_shared(void* to, const void* from, size_t bytes, Site site);
// constant: by the path for what nobody writes during the launch
void read_global(void* to, const void* from, size_t bytes, bool constant, Site site);
void write_global(void* to, const void* from, size_t bytes, Site site);

template <class V>
V load_shared(const void* from, Site site) {
    static_assert(std::is_trivially_copyable_v<V>);
    V value;
    read_shared(&value, from, sizeof(V), site);
    return value;
}

template <class V>
void store_shared(void* to, const V& value, Site site) {
    static_assert(std::is_trivially_copyable_v<V>);
    write_shared(to, &value, sizeof(V), site);
}

template <class V>
V load_global(const void* from, Site site) {
    static_assert(std::is_trivially_copyable_v<V>);
    V value;
    read_global(&value, from, sizeof(V), false, site);
    return value;
}

template <class V>
V load_stream(const void* from, Site site) {
    static_assert(std::is_trivially_copyable_v<V>);
    V value;
    read_global(&value, from, sizeof(V), true, site);
    return value;
}

template <class V>
void store_global(void* to, const V& value, Site site) {
    static_assert(std::is_trivially_copyable_v<V>);
    write_global(to, &value, sizeof(V), site);
}

int add_acquire_release(int* counter, int value, Site site);

void copy_async(void* shared, const void* global, int bytes, bool wanted, Site site);
void copy_async_commit();
void copy_async_wait(int last);

uint32_t shuffle_bits(uint32_t bits, int lane, Site site);
uint32_t shuffle_xor_bits(uint32_t bits, int mask, Site site);

template <class V>
V shuffle(V value, int lane, Site site) {
    return same_bits<V>(shuffle_bits(same_bits<uint32_t>(value), lane, site));
}

template <class V>
V shuffle_xor(V value, int mask, Site site) {
    return same_bits<V>(shuffle_xor_bits(same_bits<uint32_t>(value), mask, site));
}

void load_matrices(uint32_t* r, int count, bool trans, const void* row, Site site);

template <int COUNT, bool TRANS>
void load_matrix(uint32_t (&r)[COUNT], const void* row, Site site) {
    load_matrices(r, COUNT, TRANS, row, site);
}

void mma_16816(Kind kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);

// Counters

// Shared-memory accesses of whole warps. A wavefront is one trip to the 32 banks; conflicts are those beyond the fewest
// possible.
struct Traffic {
    int64_t accesses = 0, wavefronts = 0, conflicts = 0;
};
enum class Access { load, store, matrix, copy };
constexpr const char* ACCESS_NAMES[] = {"load", "store", "matrix", "copy"};

struct Counters {
    Traffic all[4], steady[4];  // by Access; steady: between QL_STEADY(true) and QL_STEADY(false)
    int64_t uncounted = 0;      // accesses by lanes that ran too far from each other to be compared
    int64_t operations = 0;     // memory accesses, copies, collectives and barriers of single threads
};
extern Counters measured;  // in the latest launch

}  // namespace simt

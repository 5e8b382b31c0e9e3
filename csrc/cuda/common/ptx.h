// One small function per instruction of sm_80, its meaning beside it. Hopper's are in ptx90.h.
// Numbers of 16 bits are bit patterns; T is Half (IEEE binary16) or Bf16. Arithmetic on them rounds once, to nearest even, and
// keeps denormals. Addresses are generic pointers; those into shared memory come from shared_memory().
#pragma once

#include <type_traits>

#include "device.h"

namespace quantlib::cuda {

template <class T>
constexpr bool IS_HALF = std::is_same_v<T, Half>;

// Bits of 32-bit words

// Bit by bit, the bit of LUT that the three inputs number: LUT = f(0xF0, 0xCC, 0xAA) gives f(a, b, c).
template <int LUT>
QL_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#ifdef QUANTLIB_SIMT
    return simt::lop3(LUT, a, b, c);
#else
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(LUT));
    return d;
#endif
}

// Byte i of the result is byte (selector >> 4 i) & 7 of b:a, where a holds bytes 0..3; bit 3 of the digit asks for the byte's
// sign in all eight bits instead.
QL_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef QUANTLIB_SIMT
    return simt::prmt(a, b, selector);
#else
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
#endif
}

// Pairs of 16-bit numbers

// a * b + c, both halves.
template <class T>
QL_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef QUANTLIB_SIMT
    return simt::fma2(simt::kind_of<IS_HALF<T>>(), a, b, c);
#else
    uint32_t d;
    if constexpr (IS_HALF<T>) {
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    } else {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    }
    return d;
#endif
}

// sm_80 multiplies and adds bf16 only together. The constants below lose nothing: -0 is what leaves every product as it is.
constexpr uint32_t MINUS_ZERO = 0x80008000u, BF16_ONE = 0x3F803F80u, BF16_MINUS_ONE = 0xBF80BF80u;

// a * b, both halves.
template <class T>
QL_DEVICE uint32_t mul2(uint32_t a, uint32_t b) {
#ifndef QUANTLIB_SIMT
    if constexpr (IS_HALF<T>) {
        uint32_t d;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
        return d;
    }
#endif
    return fma2<T>(a, b, MINUS_ZERO);
}

// a + b, both halves.
template <class T>
QL_DEVICE uint32_t add2(uint32_t a, uint32_t b) {
    if constexpr (IS_HALF<T>) {
#ifdef QUANTLIB_SIMT
        return simt::fma2(simt::Kind::half, a, 0x3C003C00u, b);
#else
        uint32_t d;
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
        return d;
#endif
    } else {
        return fma2<T>(a, BF16_ONE, b);
    }
}

// a - b, both halves.
template <class T>
QL_DEVICE uint32_t sub2(uint32_t a, uint32_t b) {
    if constexpr (IS_HALF<T>) {
#ifdef QUANTLIB_SIMT
        return simt::fma2(simt::Kind::half, b, 0xBC00BC00u, a);
#else
        uint32_t d;
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
        return d;
#endif
    } else {
        return fma2<T>(b, BF16_MINUS_ONE, a);
    }
}

// Two fp32 numbers to a pair, to nearest even; beyond the largest finite number, infinity.
template <class T>
QL_DEVICE uint32_t pack2(float lo, float hi) {
#ifdef QUANTLIB_SIMT
    return simt::pack2(simt::kind_of<IS_HALF<T>>(), lo, hi);
#else
    uint32_t d;
    if constexpr (IS_HALF<T>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    }
    return d;
#endif
}

// The low number of a pair in fp32, exactly.
template <class T>
QL_DEVICE float low(uint32_t pair) {
#ifdef QUANTLIB_SIMT
    return simt::widen(simt::kind_of<IS_HALF<T>>(), uint16_t(pair));
#else
    if constexpr (IS_HALF<T>) {
        float f;
        asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(uint16_t(pair)));
        return f;
    } else {
        return __uint_as_float(pair << 16);
    }
#endif
}

// The high number of a pair in fp32, exactly.
template <class T>
QL_DEVICE float high(uint32_t pair) {
#ifdef QUANTLIB_SIMT
    return simt::widen(simt::kind_of<IS_HALF<T>>(), uint16_t(pair >> 16));
#else
    if constexpr (IS_HALF<T>) {
        float f;
        asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(uint16_t(pair >> 16)));
        return f;
    } else {
        return __uint_as_float(pair & 0xFFFF0000u);
    }
#endif
}

// Loads and stores

#ifndef QUANTLIB_SIMT
namespace detail {

// The built-in type whose load or store is one instruction of that many bytes.
template <size_t BYTES>
struct Carrier;
template <>
struct Carrier<1> {
    using type = uint8_t;
};
template <>
struct Carrier<2> {
    using type = uint16_t;
};
template <>
struct Carrier<4> {
    using type = uint32_t;
};
template <>
struct Carrier<8> {
    using type = uint2;
};
template <>
struct Carrier<16> {
    using type = uint4;
};

template <class To, class From>
QL_DEVICE To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

template <class V, class... Word>
QL_DEVICE V same_words(Word... words) {
    const uint32_t bits[] = {words...};
    V value;
    memcpy(&value, bits, sizeof(V));
    return value;
}

// Word by word: a copy of the whole would forget the alignment, and move bytes.
template <class V>
QL_DEVICE V load(const void* from) {
    if constexpr (sizeof(V) == 16) {
        const uint4 found = *static_cast<const uint4*>(from);
        return same_words<V>(found.x, found.y, found.z, found.w);
    } else if constexpr (sizeof(V) == 8 && alignof(V) == 8 && sizeof(Words2) == sizeof(V)) {
        const uint2 found = *static_cast<const uint2*>(from);
        return same_words<V>(found.x, found.y);
    } else {
        return *static_cast<const V*>(from);
    }
}

template <class V>
QL_DEVICE void store(void* to, const V& value) {
    using Type = typename Carrier<sizeof(V)>::type;
    *static_cast<Type*>(to) = same_bits<Type>(value);
}

QL_DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

}  // namespace detail
#endif

// V: Words1, Words2, Words4, or a number of 1 to 8 bytes. One instruction; the address is a multiple of sizeof(V).
// Plain loads and stores, not asm, so that the compiler may move them as far as the barriers let it.
// That a pointer into shared memory is one is seen from where it comes from; saying so by __builtin_assume(__isShared(p)) made
// nvcc 13.0 drop whole main loops.
template <class V>
QL_DEVICE V load_shared(const void* from, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    return simt::load_shared<V>(from, site);
#else
    return detail::load<V>(from);
#endif
}

template <class V>
QL_DEVICE void store_shared(void* to, const V& value, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::store_shared(to, value, site);
#else
    detail::store(to, value);
#endif
}

template <class V>
QL_DEVICE V load_global(const void* from, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    return simt::load_global<V>(from, site);
#else
    __builtin_assume(__isGlobal(from));
    return detail::load<V>(from);
#endif
}

template <class V>
QL_DEVICE void store_global(void* to, const V& value, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::store_global(to, value, site);
#else
    __builtin_assume(__isGlobal(to));
    detail::store(to, value);
#endif
}

// For what no thread writes during the launch and one block reads once: past the first-level cache, which is left to the rest.
template <class V>
QL_DEVICE V load_stream(const void* from, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    return simt::load_stream<V>(from, site);
#else
    const size_t address = __cvta_generic_to_global(from);
    if constexpr (sizeof(V) == 16) {
        uint4 v;
        asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
            : "l"(address));
        return detail::same_bits<V>(v);
    } else if constexpr (sizeof(V) == 8) {
        uint2 v;
        asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
        return detail::same_bits<V>(v);
    } else if constexpr (sizeof(V) == 4) {
        uint32_t v;
        asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(address));
        return detail::same_bits<V>(v);
    } else if constexpr (sizeof(V) == 2) {
        uint16_t v;
        asm("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(address));
        return detail::same_bits<V>(v);
    } else {
        uint32_t v;
        asm("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=r"(v) : "l"(address));
        return detail::same_bits<V>(uint8_t(v));
    }
#endif
}

// Asynchronous copies

// Starts a copy of BYTES (4, 8 or 16, both addresses aligned to it) from global to shared memory; zeros where not wanted, and
// then nothing is read. 16 bytes go past the first-level cache, which the other sizes can't.
template <int BYTES>
QL_DEVICE void copy_async(void* shared, const void* global, bool wanted, [[maybe_unused]] Site site = Site::current()) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
#ifdef QUANTLIB_SIMT
    simt::copy_async(shared, global, BYTES, wanted, site);
#else
    const uint32_t to = detail::shared_address(shared);
    const size_t from = __cvta_generic_to_global(global);
    const int read = wanted ? BYTES : 0;
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(read) : "memory");
    }
#endif
}

// Closes the group of the thread's copies since the last commit. A group may be empty.
QL_DEVICE void copy_async_commit() {
#ifdef QUANTLIB_SIMT
    simt::copy_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the LAST youngest of the thread's groups are under way. The data is then seen by this thread alone: the
// others need a barrier after the wait.
template <int LAST>
QL_DEVICE void copy_async_wait() {
#ifdef QUANTLIB_SIMT
    simt::copy_async_wait(LAST);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(LAST) : "memory");
#endif
}

// Matrices of a warp

// Loads matrices of 8 rows of 8 16-bit numbers. Lane 8 i + j gives the address of row j of matrix i, 16 bytes at a multiple of
// 16. Lane L receives, of matrix i in r[i], row L / 4, columns 2 (L % 4) and the next.
QL_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* row, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::load_matrix<4, false>(r, row, site);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(detail::shared_address(row))
                 : "memory");
#endif
}

// Two matrices: only the addresses of lanes 0..15 count.
QL_DEVICE void load_matrix_x2(uint32_t (&r)[2], const void* row, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::load_matrix<2, false>(r, row, site);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(detail::shared_address(row))
                 : "memory");
#endif
}

// Transposed: lane L receives column L / 4, rows 2 (L % 4) and the next.
QL_DEVICE void load_matrix_trans_x4(uint32_t (&r)[4], const void* row, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::load_matrix<4, true>(r, row, site);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(detail::shared_address(row))
                 : "memory");
#endif
}

QL_DEVICE void load_matrix_trans_x2(uint32_t (&r)[2], const void* row, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::load_matrix<2, true>(r, row, site);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(detail::shared_address(row))
                 : "memory");
#endif
}

// d += a b with a 16 x 16, b 16 x 8 and fp32 sums d 16 x 8. With g = lane / 4 and t = lane % 4 a lane holds pairs
//     a[0]: row g, columns 2t, 2t+1    a[1]: row g+8    a[2]: row g, columns 2t+8, 2t+9    a[3]: row g+8, columns 2t+8, 2t+9
//     b[0]: rows 2t, 2t+1 of column g  b[1]: rows 2t+8, 2t+9
//     d[0], d[1]: row g, columns 2t, 2t+1                d[2], d[3]: row g+8
template <class T>
QL_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    simt::mma_16816(simt::kind_of<IS_HALF<T>>(), d, a, b, site);
#else
    if constexpr (IS_HALF<T>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
}

// Between lanes and blocks

// The value of lane `lane`, or of the lane whose number differs in the bits of `mask`. V has 4 bytes; all 32 lanes take part.
template <class V>
QL_DEVICE V shuffle(V value, int lane, [[maybe_unused]] Site site = Site::current()) {
    static_assert(sizeof(V) == 4);
#ifdef QUANTLIB_SIMT
    return simt::shuffle(value, lane, site);
#else
    return __shfl_sync(0xFFFFFFFFu, value, lane);
#endif
}

template <class V>
QL_DEVICE V shuffle_xor(V value, int mask, [[maybe_unused]] Site site = Site::current()) {
    static_assert(sizeof(V) == 4);
#ifdef QUANTLIB_SIMT
    return simt::shuffle_xor(value, mask, site);
#else
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
#endif
}

// Adds to a counter in global memory and gives what it held. Writes before it are seen by whoever reads the counter's new value
// by the same function: blocks that split K meet here.
QL_DEVICE int add_acquire_release(int* counter, int value, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    return simt::add_acquire_release(counter, value, site);
#else
    int old;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(__cvta_generic_to_global(counter)), "r"(value)
                 : "memory");
    return old;
#endif
}

}  // namespace quantlib::cuda

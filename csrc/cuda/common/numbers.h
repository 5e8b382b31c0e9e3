// Small arithmetic that kernels need beside the instructions of ptx.h.
#pragma once

#include <cmath>

#include "ptx.h"

namespace quantlib::cuda {

QL_DEVICE float from_bits(uint32_t bits) {
#ifdef QUANTLIB_SIMT
    float number;
    memcpy(&number, &bits, 4);
    return number;
#else
    return __uint_as_float(bits);
#endif
}

// a * b + c, rounded once.
QL_DEVICE float multiply_add(float a, float b, float c) {
#ifdef QUANTLIB_SIMT
    return std::fma(a, b, c);
#else
    return __fmaf_rn(a, b, c);
#endif
}

// a * b, rounded, whatever follows.
QL_DEVICE float multiply_rounded(float a, float b) {
#ifdef QUANTLIB_SIMT
    return a * b;
#else
    return __fmul_rn(a, b);
#endif
}

// a + b, rounded, whatever came before.
QL_DEVICE float add_rounded(float a, float b) {
#ifdef QUANTLIB_SIMT
    return a + b;
#else
    return __fadd_rn(a, b);
#endif
}

// An E8M0 code: 2^(code - 127); 2^-127 is subnormal.
QL_DEVICE float power_of_two(uint32_t code) { return from_bits(code == 0 ? 0x00400000 : code << 23); }

// A value that the compiler must not know.
QL_DEVICE uint32_t opaque(uint32_t value) {
#ifndef QUANTLIB_SIMT
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// The value of lane k of the lane's group of four.
QL_DEVICE uint32_t shuffle_quad(uint32_t value, int k, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    return shuffle(value, thread() % WARP / 4 * 4 + k, site);
#else
    return __shfl_sync(0xFFFFFFFF, value, k, 4);
#endif
}

// One half of a pair in both halves. Written as moves of halves, ptxas makes it a modifier of the instruction that reads it.
QL_DEVICE uint32_t low_twice(uint32_t pair) {
#ifdef QUANTLIB_SIMT
    return prmt(pair, 0, 0x1010);
#else
    uint32_t twice;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l}; }" : "=r"(twice) : "r"(pair));
    return twice;
#endif
}

QL_DEVICE uint32_t high_twice(uint32_t pair) {
#ifdef QUANTLIB_SIMT
    return prmt(pair, 0, 0x3232);
#else
    uint32_t twice;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h}; }" : "=r"(twice) : "r"(pair));
    return twice;
#endif
}

// Past the first-level cache: what other programs wrote during this launch.
template <class V>
QL_DEVICE V load_l2(const V* from, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    return simt::load_global<V>(from, site);
#else
    return __ldcg(from);
#endif
}

// The 8x8 matrix of 16-bit numbers that the warp holds, lane 4 r + q row r and columns 2 q, + 1, turned over (movmatrix).
QL_DEVICE uint32_t transpose_matrix(uint32_t pair, [[maybe_unused]] Site site = Site::current()) {
#ifdef QUANTLIB_SIMT
    int lane = thread() % WARP, row = lane / 4, column = lane % 4;
    uint32_t first = shuffle(pair, 8 * column + row / 2, site), second = shuffle(pair, 8 * column + 4 + row / 2, site);
    return prmt(first, second, row % 2 == 0 ? 0x5410 : 0x7632);
#else
    uint32_t turned;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
    return turned;
#endif
}

}  // namespace quantlib::cuda

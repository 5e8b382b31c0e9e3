// Activations to NVFP4, MXFP8 and MXFP4 in one pass: x [M, K] in 16 bits -> codes and block scales, bit for bit as the format's law
// says (quantlib/formats), scales in the 128x4 order that tensor cores read (quantlib/layouts/swizzled.py), their pad zero.
//
// A warp takes 256 columns of a row, a lane 8 of them: 16 bytes in, 4 or 8 bytes of codes out, neighbours beside each other. The
// lanes of a block agree on its largest magnitude, those of four blocks put their scales together into one word:
//
//     lane      0 1 | 2 3 | 4 5 | 6 7 ||  8 9 | ...            NVFP4, blocks of 16       4 words a warp
//     lane      0 1 2 3 | 4 5 6 7 | 8 .. | 12 .. || 16 ..      MX, blocks of 32          2 words a warp
//
// NVFP4's fp32 multiplier belongs to the whole of x: `absmax_kernel` makes it in a pass of its own, unless it is given.
//
// A block that holds a NaN or an infinity gets the scale NaN and codes of zero: its product is NaN.
#pragma once

#include "ptx100.h"

namespace quantlib::cuda {

constexpr int QUANTIZE_WARPS = 4;
constexpr int QUANTIZE_ROWS = QUANTIZE_WARPS;  // of a block, a warp each
constexpr int LANE_COLUMNS = 8;
constexpr int CHUNK = WARP * LANE_COLUMNS;  // columns of a warp
constexpr int ABSMAX_THREADS = 256;
constexpr int ABSMAX_COLUMNS = ABSMAX_THREADS * LANE_COLUMNS;  // of a block

constexpr uint32_t INFINITY_BITS = 0x7F800000;
constexpr uint32_t NAN_E4M3 = 0x7F, NAN_E8M0 = 0xFF;

// x [M, K] in 16 bits, columns beside each other. aligned: every row starts at a multiple of 16 bytes.
struct Rows {
    const std::byte* x;
    int m, k;
    int64_t stride;  // elements from row to row
    bool aligned;
};

struct Quantized {
    std::byte* codes;    // [M, columns] of 4 or 8 bits
    std::byte* scales;   // [ceil(M / 128), ceil(across / 4), 512]
    int columns, across; // K in whole blocks, and how many these are
    const float* multiplier;  // NVFP4's, one
};

// Formats. SHIFT: floor(log2) of the largest element, for E8M0.
struct Nvfp4Codes {
    static constexpr int GROUP = 16, BITS = 4;
    static constexpr bool POWER_SCALES = false;
    static constexpr float LARGEST = 6.0f, LARGEST_SCALE = 448.0f;
};
struct Mxfp8Codes {
    static constexpr int GROUP = 32, BITS = 8, SHIFT = 8;
    static constexpr bool POWER_SCALES = true;
    static constexpr float LARGEST = 448.0f;
};
struct Mxfp4Codes {
    static constexpr int GROUP = 32, BITS = 4, SHIFT = 2;
    static constexpr bool POWER_SCALES = true;
    static constexpr float LARGEST = 6.0f;
};

// ------------------------------------------------------------------------------------------------------------------ magnitudes

QL_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Columns column .. column + 7 of a row, two in a word; zero beyond K.
QL_DEVICE Words4 load_eight(const Rows& rows, int row, int column) {
    const std::byte* from = rows.x + 2 * (row * rows.stride + column);
    if (rows.aligned && column + LANE_COLUMNS <= rows.k) return load_global<Words4>(from);
    Words4 eight = {};
    QL_UNROLL
    for (int i = 0; i < LANE_COLUMNS; ++i) {
        if (column + i < rows.k) eight.w[i / 2] |= uint32_t(load_global<uint16_t>(from + 2 * i)) << (i % 2 * 16);
    }
    return eight;
}

// The largest magnitude as a 16-bit pattern in the upper half. Patterns of positive floats count upward with their value, and NaN
// lies above infinity: nothing is rounded, no NaN is lost.
QL_DEVICE uint32_t largest_of(const Words4& eight) {
    uint32_t peak = 0;
    QL_UNROLL
    for (int i = 0; i < 4; ++i) {
        peak = larger(peak, larger(eight.w[i] & 0x7FFF0000, eight.w[i] << 16 & 0x7FFF0000));
    }
    return peak;
}

template <class T>
QL_DEVICE uint32_t in_fp32(uint32_t peak) {
    return to_bits(high<T>(peak));
}

// NVFP4's multiplier for the largest magnitude of x.
QL_DEVICE float global_multiplier(uint32_t peak_bits) {
    if (peak_bits >= INFINITY_BITS) return from_bits(0x7FFFFFFF);
    const float scale = from_bits(peak_bits) / (Nvfp4Codes::LARGEST * Nvfp4Codes::LARGEST_SCALE);
    return scale > 0.0f ? scale : 1.0f;
}

// The largest magnitude among the threads of a block, known to thread 0. `room`: a word for each warp, which nobody else uses.
QL_DEVICE uint32_t largest_of_block(uint32_t peak, std::byte* room) {
    QL_UNROLL
    for (int mask = 1; mask < WARP; mask *= 2) peak = larger(peak, shuffle_xor(peak, mask));
    if (thread() % WARP == 0) store_shared(room + 4 * (thread() / WARP), peak);
    sync_threads();
    if (thread() == 0) {
        QL_UNROLL
        for (int warp = 1; warp < ABSMAX_THREADS / WARP; ++warp) peak = larger(peak, load_shared<uint32_t>(room + 4 * warp));
    }
    return peak;
}

// x -> multiplier [1]. Blocks leave the largest magnitude of their share in peaks [grid_x * grid_y]; the one that comes last takes
// the largest of all. counter: zero before and after.
template <class T>
QL_KERNEL(ABSMAX_THREADS, 1) absmax_kernel(Rows rows, uint32_t* peaks, int* counter, float* multiplier) {
    const int column = block_x() * ABSMAX_COLUMNS + thread() * LANE_COLUMNS;
    const int blocks = grid_x() * grid_y();
    uint32_t peak = 0;
    if (column < rows.k) {
        for (int row = block_y(); row < rows.m; row += grid_y()) peak = larger(peak, largest_of(load_eight(rows, row, column)));
    }
    std::byte* room = shared_memory();
    std::byte* flag = room + 4 * (ABSMAX_THREADS / WARP);
    peak = largest_of_block(peak, room);
    if (thread() == 0) {
        store_global(peaks + block_y() * grid_x() + block_x(), peak);
        const bool last = add_acquire_release(counter, 1) == blocks - 1;
        if (last) store_global(counter, 0);
        store_shared(flag, uint32_t(last));
    }
    sync_threads();
    if (load_shared<uint32_t>(flag) == 0) return;
    peak = 0;
    for (int i = thread(); i < blocks; i += ABSMAX_THREADS) peak = larger(peak, load_l2(peaks + i));
    peak = largest_of_block(peak, room);
    if (thread() == 0) store_global(multiplier, global_multiplier(in_fp32<T>(peak)));
}

// ---------------------------------------------------------------------------------------------------------------------- scales

// An E4M3 code without sign in fp32.
QL_DEVICE float e4m3_value(uint32_t code) {
    if (code == NAN_E4M3) return from_bits(0x7FFFFFFF);
    const uint32_t exponent = code >> 3;
    return exponent == 0 ? float(code) * 0x1p-9f : from_bits((exponent + 120) << 23 | (code & 7) << 20);
}

// The E4M3 code of a positive number, which never is zero.
QL_DEVICE uint32_t scale_code(float scale) { return convert_e4m3x2(scale > 0x1p-9f ? scale : 0x1p-9f, 0.0f) & 0xFF; }

// The E4M3 code of a block of NVFP4. The law rounds a scale, multiplies it out and rounds it again when it stores it; under a
// subnormal multiplier the two differ.
QL_DEVICE uint32_t block_code(uint32_t peak_bits, float multiplier) {
    if (peak_bits >= INFINITY_BITS || !(multiplier == multiplier)) return NAN_E4M3;
    const uint32_t code = scale_code(from_bits(peak_bits) / (Nvfp4Codes::LARGEST * multiplier));
    return scale_code(e4m3_value(code) * multiplier / multiplier);
}

// The E8M0 code of a block of MX. CEIL: the smallest power of two for which nothing saturates.
template <class Format, bool CEIL>
QL_DEVICE uint32_t power_code(uint32_t peak_bits) {
    if (peak_bits >= INFINITY_BITS) return NAN_E8M0;
    uint32_t code;
    if constexpr (CEIL) {
        const uint32_t ratio = to_bits(from_bits(peak_bits) / Format::LARGEST);
        const uint32_t exponent = ratio >> 23, fraction = ratio & 0x7FFFFF;
        code = exponent + (fraction > (exponent == 0 ? 1u << 22 : 0u) ? 1 : 0);  // 2^-127, code 0, is subnormal: bit 22
    } else {
        const uint32_t exponent = peak_bits >> 23;
        code = exponent > Format::SHIFT ? exponent - Format::SHIFT : 0;
    }
    return code < 254 ? code : 254;
}

// ----------------------------------------------------------------------------------------------------------------------- codes

// What dividing by one scale takes. Quotients are exact to the last bit, as the law's are, without a division each: a product with
// the inverse is corrected twice by its exact remainder, which ends at the rounded quotient (Markstein, IBM J. Res. Dev. 34, 1990).
// A power of two keeps inverse and remainders out of the subnormal numbers; from 1024 on every code has saturated.
struct Divisor {
    float power, divisor, inverse, bound, vanishing;
};

QL_DEVICE Divisor divisor_of(float scale) {
    if (!(scale > 0.0f && to_bits(scale) < INFINITY_BITS)) return {0.0f, 1.0f, 1.0f, 0.0f, from_bits(INFINITY_BITS)};
    const float power = scale < 0x1p-62f ? 0x1p64f : scale > 0x1p62f ? 0x1p-64f : 1.0f;
    const float divisor = scale * power;
    return {power, divisor, 1.0f / divisor, divisor * 1024.0f, scale * 0x1p-90f};
}

// x / scale. A quotient that rounds to zero has no sign, because the law's E2M1 codes give the sign to numbers below zero.
QL_DEVICE float quotient(float x, const Divisor& by) {
    const float magnitude = fabsf(x), scaled = magnitude * by.power;
    const float numerator = scaled < by.bound ? scaled : by.bound;
    float q = multiply_rounded(numerator, by.inverse);
    q = multiply_add(multiply_add(-q, by.divisor, numerator), by.inverse, q);
    q = multiply_add(multiply_add(-q, by.divisor, numerator), by.inverse, q);
    // Below 2^-150 of the scale.
    const bool signless = !(magnitude * 0x1p60f > by.vanishing);
    return from_bits(to_bits(q) | (signless ? 0u : to_bits(x) & 0x80000000u));
}

// The codes of eight numbers: 4 or 8 bytes.
template <class Format>
QL_DEVICE void store_codes(const Quantized& out, int row, int column, const float (&value)[LANE_COLUMNS]) {
    std::byte* to = out.codes + (int64_t(row) * out.columns + column) * Format::BITS / 8;
    if constexpr (Format::BITS == 4) {
        Words1 codes = {};
        QL_UNROLL
        for (int i = 0; i < 4; ++i) codes.w[0] |= convert_e2m1x2(value[2 * i], value[2 * i + 1]) << (8 * i);
        store_global(to, codes);
    } else {
        Words2 codes = {};
        QL_UNROLL
        for (int i = 0; i < 4; ++i) codes.w[i / 2] |= convert_e4m3x2(value[2 * i], value[2 * i + 1]) << (i % 2 * 16);
        store_global(to, codes);
    }
}

// The grid is (ceil(rows / QUANTIZE_ROWS), ceil(columns / CHUNK)) over rows and columns that have a place among the scales, M and
// across in whole tiles; places outside of x are set to zero.
template <class Format, class T, bool CEIL>
QL_KERNEL(QUANTIZE_WARPS * WARP, 1) quantize_kernel(Rows rows, Quantized out) {
    constexpr int LANES = Format::GROUP / LANE_COLUMNS;  // of a block
    const int lane = thread() % WARP, row = block_x() * QUANTIZE_ROWS + thread() / WARP;
    const int column = block_y() * CHUNK + lane * LANE_COLUMNS;
    const int tiles = (out.across + 3) / 4, tile = column / (4 * Format::GROUP);
    const bool inside = row < rows.m && column < out.columns;

    Words4 eight = {};
    if (inside) eight = load_eight(rows, row, column);
    uint32_t peak = largest_of(eight);
    QL_UNROLL
    for (int mask = 1; mask < LANES; mask *= 2) peak = larger(peak, shuffle_xor(peak, mask));
    peak = in_fp32<T>(peak);

    float value[LANE_COLUMNS];
    QL_UNROLL
    for (int i = 0; i < LANE_COLUMNS; ++i) value[i] = i % 2 == 0 ? low<T>(eight.w[i / 2]) : high<T>(eight.w[i / 2]);
    uint32_t code;
    if constexpr (Format::POWER_SCALES) {
        code = power_code<Format, CEIL>(peak);
        // Multiplying by the inverse power of two is dividing. Adding zero takes the sign from -0, where the law gives none.
        const float inverse = power_of_two(code == NAN_E8M0 ? 0 : 254 - code);
        QL_UNROLL
        for (int i = 0; i < LANE_COLUMNS; ++i) {
            value[i] = code == NAN_E8M0 ? 0.0f : multiply_rounded(value[i], inverse);
            if constexpr (Format::BITS == 4) value[i] = add_rounded(value[i], 0.0f);
        }
    } else {
        const float multiplier = load_global<float>(out.multiplier);
        code = block_code(peak, multiplier);
        const Divisor by = divisor_of(multiply_rounded(e4m3_value(code), multiplier));
        QL_UNROLL
        for (int i = 0; i < LANE_COLUMNS; ++i) value[i] = quotient(value[i], by);
    }
    if (inside) store_codes<Format>(out, row, column, value);

    uint32_t word = (inside ? code : 0) << (lane / LANES % 4 * 8);
    word |= shuffle_xor(word, LANES);
    word |= shuffle_xor(word, 2 * LANES);
    const int last = (rows.m + 127) / 128 * 128;
    if (lane % (4 * LANES) == 0 && row < last && tile < tiles) {
        const int64_t at = (int64_t(row / 128) * tiles + tile) * 512 + row % 32 * 16 + row % 128 / 32 * 4;
        store_global(out.scales + at, Words1{{word}});
    }
}

}  // namespace quantlib::cuda

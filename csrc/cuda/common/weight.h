// What crosses from the host to the kernels of the fragments layout: plain structs, for host and device compilers alike.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantlib::cuda {

enum class ScaleDType : int { fp16, bf16, fp32, e8m0, byte };  // byte: a code, of E4M3 or of the map of double quantization

// Which numbers multiply which weights.
enum class ScaleHome : int {
    strip,   // blocks of one row: words ordered like codes
    row,     // one number per row
    tensor,  // one number
    grid,    // 2-D blocks of block_rows x block_columns
};

struct FragmentWeight {
    const std::byte* planes[3];  // code planes, low bits first
    const std::byte* scales;     // strip words, or numbers [rows], [1], [blocks down, blocks across]
    const std::byte* zeros;      // strip words of integer zero points; null: none
    const float* absmax;         // double quantization: fp32 per 256 scales; NVFP4: the tensor's multiplier [1]
    const float* absmax_offset;  // double quantization: [1]
    const float* scale_map;      // double quantization: [256]
    const float* table;          // code book [16]
    int n, k;
    int tiles, tile_columns;     // along K
    int group;                   // columns that share a scale: 16, 32, 64 or 128 times a power of two; 0: whole rows
    int block_rows;              // 2-D blocks
    int across;                  // blocks along a row
    int unit_columns, units;     // strip words: columns and number of the pieces they lie in
    int offset;                  // integers: value = code - offset - zero
    ScaleDType scale_dtype;
    ScaleHome scale_home;
};

// Units of work (block of y, turn of its reduction) are dealt out in one row, `each` to a program (meeting.h).
struct Schedule {
    int blocks;      // of y
    int turns;       // of a block
    int64_t each;    // units of a program
    float* partial;  // [2 * programs, sums of a block]; null where no block is shared
    int* counters;   // [blocks], zero before and after; null likewise
};

struct LinearArguments {
    FragmentWeight weight;
    const std::byte* x;         // [m, k] 16 bits, rows x_stride elements apart, zeros behind k up to a multiple of 8 (gemv: of 128)
                                // elements; x and x_stride are multiples of 8 elements
    std::byte* y;               // [m, n] contiguous
    const std::byte* bias;      // [n] or null
    const std::byte* residual;  // [m, n] contiguous, or null
    int m;
    int64_t x_stride;
    Schedule schedule;
};

struct DgradArguments {
    FragmentWeight weight;
    const std::byte* dy;  // [m, n] 16 bits, rows dy_stride elements apart; dy, dy_stride and n are multiples of 8 elements
    std::byte* dx;        // [m, k] contiguous
    int m;
    int64_t dy_stride;
    Schedule schedule;
};

}  // namespace quantlib::cuda

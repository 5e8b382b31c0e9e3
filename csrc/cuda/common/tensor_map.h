// What a tensor copy must know of a matrix in global memory, made on the host and passed to the kernel by value:
//     QL_KERNEL(384, 1) kernel(const QL_GRID_CONSTANT TensorMap x, ...)
#pragma once

#include <stdexcept>
#include <string>

#ifdef QUANTLIB_SIMT
#include "simt90.h"
#else
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "check.h"
#endif

namespace quantlib::cuda {

#ifdef QUANTLIB_SIMT
using TensorMap = simt::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// bytes128: rows of 128 bytes, whose 16-byte pieces are exchanged: the piece at bits 4..6 of its address in shared memory goes
// where these bits are xor-ed with bits 7..9, the row. Eight rows then lie in different banks.
enum class Swizzle { none, bytes128 };

struct Matrix {
    const void* base;  // at a multiple of 16, as row_bytes
    int64_t rows, columns, row_bytes;
    int element_bytes;  // 1, 2 or 4
};

// A map whose copies bring box_rows x box_columns elements, zeros where the matrix has ended. Throws where the hardware would
// refuse.
inline TensorMap make_tensor_map(const Matrix& matrix, int box_rows, int box_columns, Swizzle swizzle) {
    const auto demand = [](bool holds, const char* what) {
        if (!holds) throw std::invalid_argument(std::string("tensor map: ") + what);
    };
    const int size = matrix.element_bytes, box_row_bytes = box_columns * size;
    demand(size == 1 || size == 2 || size == 4, "elements have 1, 2 or 4 bytes");
    demand(reinterpret_cast<uintptr_t>(matrix.base) % 16 == 0, "the matrix begins at a multiple of 16 bytes");
    demand(matrix.row_bytes % 16 == 0, "rows lie a multiple of 16 bytes apart");
    demand(matrix.rows > 0 && matrix.columns > 0 && matrix.row_bytes >= matrix.columns * size, "rows must not overlap");
    demand(box_rows >= 1 && box_columns >= 1 && box_rows <= 256 && box_columns <= 256, "a box has 1 to 256 rows and columns");
    demand(box_row_bytes % 16 == 0, "a row of the box has a multiple of 16 bytes");
    demand(swizzle == Swizzle::none || box_row_bytes == 128, "a swizzled box has rows of 128 bytes");
#ifdef QUANTLIB_SIMT
    const bool swizzled = swizzle == Swizzle::bytes128;
    return {matrix.base, matrix.rows, matrix.columns, matrix.row_bytes, size, box_rows, box_columns, swizzled};
#else
    // From the driver by way of the runtime: the extension doesn't link against libcuda, which a machine without a GPU lacks.
    decltype(&cuTensorMapEncodeTiled) encode = nullptr;
    cudaDriverEntryPointQueryResult found;
    void** const entry = reinterpret_cast<void**>(&encode);
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", entry, 12000, cudaEnableDefault, &found),
          "make_tensor_map");
    if (found != cudaDriverEntryPointSuccess) throw CudaError("make_tensor_map", "", "the driver is too old", 0);
    const CUtensorMapDataType type = size == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                     : size == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_UINT32;
    // Sizes are given from the fastest dimension to the slowest, the distance of neighbours only for the latter.
    const cuuint64_t sizes[2] = {cuuint64_t(matrix.columns), cuuint64_t(matrix.rows)};
    const cuuint64_t strides[1] = {cuuint64_t(matrix.row_bytes)};
    const cuuint32_t box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, steps[2] = {1, 1};
    CUtensorMap map;
    const CUresult result =
        encode(&map, type, 2, const_cast<void*>(matrix.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               swizzle == Swizzle::bytes128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) throw CudaError("make_tensor_map", "", "cuTensorMapEncodeTiled refused", int(result));
    return map;
#endif
}

}  // namespace quantlib::cuda

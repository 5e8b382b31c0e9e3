// The tiles of block-scaled products on sm_100 and sm_103, W's rows first.
//
//   narrow   128 x 64, one multiprocessor; stream-K shares the K of few tiles among all multiprocessors
//   middle   256 x 128 by two multiprocessors, which hold half of the weight's tile each and share the activations
//   wide     256 x 256 by two, in clusters of 2 x 2: each operand is fetched once for two tiles
//
// K of a tile is 128 bytes of the wider operand.
#pragma once

#include "../common/scaled_gemm_cutlass.h"

namespace quantlib::cuda::sm100 {

using Chip = cutlass::arch::Sm100;

template <class Schedule, int K>
using Narrow = Tile<Chip, Shape<Int<128>, Int<64>, Int<K>>, Shape<Int<1>, Int<1>, Int<1>>, 1, Schedule,
                    cutlass::epilogue::TmaWarpSpecialized1Sm, cutlass::gemm::StreamKScheduler>;
template <class Schedule, int K>
using Middle = Tile<Chip, Shape<Int<256>, Int<128>, Int<K>>, Shape<Int<2>, Int<1>, Int<1>>, 2, Schedule,
                    cutlass::epilogue::TmaWarpSpecialized2Sm, cutlass::gemm::PersistentScheduler>;
template <class Schedule, int K>
using Wide = Tile<Chip, Shape<Int<256>, Int<256>, Int<K>>, Shape<Int<2>, Int<2>, Int<1>>, 2, Schedule,
                  cutlass::epilogue::TmaWarpSpecialized2Sm, cutlass::gemm::PersistentScheduler>;

}  // namespace quantlib::cuda::sm100

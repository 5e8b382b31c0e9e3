// The tiles of block-scaled products on sm_120 and sm_121, W's rows first: 99 KB of shared memory a multiprocessor, no clusters.
//
//   narrow   128 x 128; stream-K shares the K of few tiles among all multiprocessors
//   wide     256 x 128, E2M1 alone (of bytes two stages don't fit): operands are read from shared memory a quarter less often
//
// 128 columns of a tile are the fewest that CUTLASS builds here.
#pragma once

#include "../common/scaled_gemm_cutlass.h"

namespace quantlib::cuda::sm120 {

template <class Schedule, int ROWS, class Scheduler>
using Of = Tile<cutlass::arch::Sm120, Shape<Int<ROWS>, Int<128>, Int<128>>, Shape<Int<1>, Int<1>, Int<1>>, 1, Schedule,
                cutlass::epilogue::collective::EpilogueScheduleAuto, Scheduler>;

template <class Schedule>
using Narrow = Of<Schedule, 128, cutlass::gemm::StreamKScheduler>;
template <class Schedule>
using Wide = Of<Schedule, 256, cutlass::gemm::PersistentScheduler>;
template <class Schedule>
using Unshared = Of<Schedule, 128, cutlass::gemm::PersistentScheduler>;  // for results that are quantized again

}  // namespace quantlib::cuda::sm120

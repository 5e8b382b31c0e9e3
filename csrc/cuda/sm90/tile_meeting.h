// `meet` (common/meeting.h) for some threads of a block, the first THREADS, while others are busy elsewhere.
#pragma once

#include "../common/meeting.h"
#include "../common/ptx90.h"

namespace quantlib::cuda {

constexpr int MEETING_BARRIER = 1;

template <int THREADS, int COUNT>
QL_DEVICE bool meet_group(const Schedule& s, const Share& share, float (&sums)[COUNT], std::byte* flag) {
    if (share.whole) return true;
    constexpr int64_t SUMS = int64_t(THREADS) * COUNT;
    float* mine = s.partial + share.place(s, block_x()) * SUMS + thread();
    QL_UNROLL
    for (int i = 0; i < COUNT; ++i) store_global(mine + i * THREADS, sums[i]);
    thread_fence();
    sync_group(MEETING_BARRIER, THREADS);
    if (thread() == 0) {
        int arrived = add_acquire_release(s.counters + share.block, 1);
        bool last = arrived == share.last - share.first;
        if (last) store_global(s.counters + share.block, 0);
        store_shared(flag, uint32_t(last));
    }
    sync_group(MEETING_BARRIER, THREADS);
    bool last = load_shared<uint32_t>(flag) != 0;
    sync_group(MEETING_BARRIER, THREADS);
    if (!last) return false;
    thread_fence();
    QL_UNROLL
    for (int i = 0; i < COUNT; ++i) sums[i] = 0.0f;
    QL_NO_UNROLL
    for (int program = share.first; program <= share.last; ++program) {
        const float* from = s.partial + share.place(s, program) * SUMS + thread();
        QL_UNROLL
        for (int i = 0; i < COUNT; ++i) sums[i] += load_l2<float>(from + i * THREADS);
    }
    return true;
}

}  // namespace quantlib::cuda

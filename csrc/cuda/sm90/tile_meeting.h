// `meet` (common/meeting.h) for some threads of a block, the first THREADS, while others are busy elsewhere.
#pragma once

#include "../common/meeting.h"
#include "../common/ptx90.h"

namespace quantlib::cuda {

constexpr int MEETING_BARRIER = 1;

template <int THREADS, int COUNT>
QL_DEVICE bool meet_group(const Schedule& s, const Share& share, float (&sums)[COUNT], std::byte* flag) {
    return meet<THREADS>(s, share, sums, flag, [] { sync_group(MEETING_BARRIER, THREADS); });
}

}  // namespace quantlib::cuda

// How programs that share a block of y meet: units of work (block, turn) are dealt out in one row, `each` to a program, so that a
// block's turns lie with one program or with several that follow each other ("stream-K"). A program that has only some of a
// block's turns leaves its sums in the workspace; the one that arrives last adds all of them up in ascending order, so that the
// result depends neither on who that was nor on the run.
#pragma once

#include "numbers.h"
#include "weight.h"

namespace quantlib::cuda {

// One program's part of one block: turns [begin, end), and whom it shares the block with.
struct Share {
    int block, begin, end;
    int first, last;  // programs
    bool whole;

    QL_DEVICE Share(const Schedule& s, int64_t unit, int64_t stop) {
        block = int(unit / s.turns);
        int64_t start = int64_t(block) * s.turns;
        begin = int(unit - start);
        int64_t until = stop < start + s.turns ? stop : start + s.turns;
        end = int(until - start);
        first = int(start / s.each), last = int((start + s.turns - 1) / s.each);
        whole = first == last;
    }

    // The program's place in the workspace for this block: a program shares at most two, its first and its last.
    QL_DEVICE int64_t place(const Schedule& s, int program) const {
        bool begins_before = int64_t(program) * s.each >= int64_t(block) * s.turns;
        return 2 * int64_t(program) + (begins_before ? 0 : 1);
    }
};

// sums[COUNT] of this thread -> the whole block's sums; true for the threads of the program that arrived last. `flag`: 4 bytes of
// shared memory that nobody else uses. COUNT numbers of THREADS threads make a block.
// wait: the barrier of those threads, the first of the program.
template <int THREADS, int COUNT, class Wait>
QL_DEVICE bool meet(const Schedule& s, const Share& share, float (&sums)[COUNT], std::byte* flag, const Wait& wait) {
    if (share.whole) return true;
    constexpr int64_t SUMS = int64_t(THREADS) * COUNT;
    float* mine = s.partial + share.place(s, block_x()) * SUMS + thread();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) store_global(mine + i * THREADS, sums[i]);
    thread_fence();
    wait();
    if (thread() == 0) {
        int arrived = add_acquire_release(s.counters + share.block, 1);
        bool last = arrived == share.last - share.first;
        if (last) store_global(s.counters + share.block, 0);
        store_shared(flag, uint32_t(last));
    }
    wait();
    bool last = load_shared<uint32_t>(flag) != 0;
    wait();
    if (!last) return false;
    thread_fence();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sums[i] = 0.0f;
    QL_NO_UNROLL
    for (int program = share.first; program <= share.last; ++program) {
        const float* from = s.partial + share.place(s, program) * SUMS + thread();
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[i] += load_l2<float>(from + i * THREADS);
    }
    return true;
}

// All threads of the program.
template <int THREADS, int COUNT>
QL_DEVICE bool meet(const Schedule& s, const Share& share, float (&sums)[COUNT], std::byte* flag) {
    return meet<THREADS>(s, share, sums, flag, [] { sync_threads(); });
}

}  // namespace quantlib::cuda

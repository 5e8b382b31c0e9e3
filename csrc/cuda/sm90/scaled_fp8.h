// y [M, N] = x [M, K] W^T on Hopper, both operands E4M3 with fp32 scales that may change every 128 of K.
//
//     producer    a thread: wait until a stage is empty | tensor copies of codes and scales of both operands -> the stage's
//                 barrier counts the bytes
//     consumers   2 warpgroups: wait for the stage | products of 128 columns, 4 wgmma from shared memory into `part` |
//                 sums += part * (scale of x * scale of W), in fp32, outside the tensor cores, which keep fewer bits
//     stage       x: BM rows of 128 bytes | W: 128 rows of 128 bytes, both in the 128-byte swizzle | scales of the rows of x |
//                 of the rows of W, or of its block
//
// Few rows of x: the transpose is computed, W on the wide side of the instruction and 16, 32 or 64 rows of x on the other.
// Many: 64 or 128 rows of x for each warpgroup, and then a lane has few scales of x and one of W. A warpgroup waits for its own
// products before it adds them up; those of the other one run meanwhile.
//
// Scales that belong to whole rows are read at every turn again, as if they changed: one kernel for all.
#pragma once

#include "scaled_fp8_consumer.h"
#include "tile_config.h"

namespace quantlib::cuda {

// The codes and scales of one turn -> a stage; one thread.
template <class Config, class Place>
QL_DEVICE void copy_scaled_turn(const ScaledFp8Arguments& args, const Place& place, int turn, std::byte* stage, Barrier* full) {
    barrier_expect(full, Config::COPIED_BYTES);
    copy_tensor(stage + Config::X_AT, args.x, turn * SCALED_COLUMNS, place.first_m, full);
    copy_tensor(stage + Config::W_AT, args.w, turn * SCALED_COLUMNS, place.first_n, full);
    copy_tensor(stage + Config::X_SCALES_AT, args.x_scales, place.first_m, turn * args.x_step, full);
    int first_scale = Config::BLOCKS ? place.first_n / Config::BN : place.first_n;
    copy_tensor(stage + Config::W_SCALES_AT, args.w_scales, first_scale, turn * args.w_step, full);
}

// Grid: (programs).
template <class Config>
QL_KERNEL(Config::THREADS, 1) scaled_fp8_kernel(const QL_GRID_CONSTANT ScaledFp8Arguments args) {
    using Place = ScaledFp8Place<Config::BM, Config::BN>;
    std::byte* shared = shared_memory();
    Barrier* full = reinterpret_cast<Barrier*>(shared + Config::BARRIERS_AT);
    Barrier* empty = full + Config::STAGES;
    if (thread() == 0) {
        for (int s = 0; s < Config::STAGES; ++s) {
            barrier_init(full + s, 1);
            barrier_init(empty + s, Config::CONSUMERS / WARP);
        }
        barrier_init_fence();
    }
    sync_threads();

    Ring<Config::STAGES> ring;
    if (thread() >= Config::CONSUMERS) {
        registers_release<Config::PRODUCER_REGISTERS>();
        if (thread() != Config::CONSUMERS) return;
        for (Walk walk(args.schedule); walk.more();) {
            const Share share = walk.share();
            const Place place(share.block, args.m, args.n);
            QL_NO_UNROLL
            for (int turn = share.begin; turn < share.end; ++turn) {
                barrier_wait(empty + ring.slot, ring.parity ^ 1);
                copy_scaled_turn<Config>(args, place, turn, shared + ring.slot * Config::STAGE_BYTES, full + ring.slot);
                ring.advance();
            }
            walk.advance(share);
        }
    } else {
        registers_take<Config::CONSUMER_REGISTERS>();
        ScaledFp8Consumer<Config> consumer(args);
        for (Walk walk(args.schedule); walk.more();) {
            const Share share = walk.share();
            const Place place(share.block, args.m, args.n);
            consumer.run(ring, shared, share.end - share.begin);
            if (meet_group<Config::CONSUMERS>(args.schedule, share, consumer.sums, shared + Config::FLAG_AT)) {
                consumer.store(place.first_m, place.first_n);
            }
            walk.advance(share);
        }
    }
}

}  // namespace quantlib::cuda

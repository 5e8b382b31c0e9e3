// y [M, N] = x [M, K] W^T for 16 and more rows of x on Hopper, W in the fragments layout.
//
// The transpose is computed, y^T = W x^T: a warpgroup's 64 rows of W are the A operand of wgmma m64nNk16. It comes from
// registers, whose order in each of the four warps is that of the layout's strips, so that a lane decodes exactly what it
// multiplies. x^T is the B operand, in shared memory.
//
//     producers   4 warps, a thread each: wait until a stage is empty | bulk copies of the words of two strips, the first also
//                 tensor copies of x -> the stage's barrier counts the bytes
//     consumers   2 warpgroups, 128 rows of W:    decode 32 columns into a[0] | start their products, a commit group
//                                                 decode the next into a[1] meanwhile | start | wait for the first | ...
//     stage       x: 2 boxes [BM rows][64 columns], 128-byte swizzle | words of 8 strips | their scales | their zeros
//
// Scales of blocks multiply fp32 sums: `part` holds the products of a piece of PIECE steps (16 columns each), `sums` the
// finished ones. A warpgroup that finishes a piece leaves the tensor cores to the other one. Units of work are dealt out as to
// the Ampere kernel (common/meeting.h): few rows of x leave too few blocks of y for a whole chip, and the sums then meet in
// fixed order.
#pragma once

#include "tile_consumer.h"
#include "tile_meeting.h"
#include "tile_producer.h"

namespace quantlib::cuda {

// Grid: (programs).
template <class Config>
QL_KERNEL(Config::THREADS, Config::PROGRAMS) linear_tile_kernel(const QL_GRID_CONSTANT TileArguments args) {
    using Codec = typename Config::Codec;
    using Place = TilePlace<Config::BM, Config::BN>;
    std::byte* shared = shared_memory();
    Barrier* full = reinterpret_cast<Barrier*>(shared + Config::BARRIERS_AT);
    Barrier* empty = full + Config::STAGES;
    if (thread() == 0) {
        for (int s = 0; s < Config::STAGES; ++s) {
            barrier_init(full + s, Config::PRODUCERS / WARP);
            barrier_init(empty + s, Config::CONSUMERS / WARP);
        }
        barrier_init_fence();
    }
    if constexpr (Config::MAP_BYTES > 0) {
        if (thread() < 256) {
            store_shared(shared + Config::MAP_AT + 4 * thread(), load_global<float>(args.linear.weight.scale_map + thread()));
        }
    }
    if constexpr (Codec::TABLE_BYTES > 0) Codec::fill(shared, args.linear.weight, thread(), Config::THREADS);
    sync_threads();

    const Schedule& schedule = args.linear.schedule;
    int64_t unit = int64_t(block_x()) * schedule.each, all = int64_t(schedule.blocks) * schedule.turns;
    int64_t stop = unit + schedule.each < all ? unit + schedule.each : all;
    Ring<Config::STAGES> ring;
    if (thread() >= Config::CONSUMERS) {
        registers_release<Config::PRODUCER_REGISTERS>();
        if (thread() % WARP != 0) return;
        TileProducer<Config> producer(args, (thread() - Config::CONSUMERS) / WARP);
        while (unit < stop) {
            Share share(schedule, unit, stop);
            Place place(share.block, args.linear.m);
            QL_NO_UNROLL
            for (int turn = share.begin; turn < share.end; ++turn) {
                barrier_wait(empty + ring.slot, ring.parity ^ 1);
                std::byte* stage = shared + Codec::TABLE_BYTES + ring.slot * Config::STAGE_BYTES;
                producer.copy_stage(stage, full + ring.slot, place.first_n, place.first_m, turn);
                ring.advance();
            }
            unit += share.end - share.begin;
        }
    } else {
        registers_take<Config::CONSUMER_REGISTERS>();
        TileConsumer<Config> consumer(args.linear, shared);
        while (unit < stop) {
            Share share(schedule, unit, stop);
            Place place(share.block, args.linear.m);
            int strip = place.first_n / STRIP + consumer.warp, last = (args.linear.weight.n - 1) / STRIP;
            consumer.run(ring, strip > last ? last : strip, share.begin, share.end);
            if (meet_group<Config::CONSUMERS>(schedule, share, consumer.sums, shared + Config::FLAG_AT)) {
                consumer.store(place.first_n, place.first_m);
            }
            unit += share.end - share.begin;
        }
    }
}

}  // namespace quantlib::cuda

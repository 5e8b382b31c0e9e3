// Sizes of linear_tile: what a block, a stage and a program are.
#pragma once

#include "../common/decode.h"
#include "../common/ptx90.h"
#include "../common/scales.h"

namespace quantlib::cuda {

struct TileArguments {
    TensorMap x;  // boxes of BM rows and 64 columns
    LinearArguments linear;
};

// PIECE: steps after which sums are scaled, every block of scales being a multiple of that; 0: none are scaled before the end.
template <class Codec_, class T_, Scaling SCALING_, int PIECE_, int BM_>
struct TileConfig {
    using Codec = Codec_;
    using T = T_;
    static constexpr Scaling SCALING = SCALING_;
    static constexpr int PIECE = PIECE_, BM = BM_;
    static constexpr int CONSUMERS = 256, PRODUCERS = 128, THREADS = CONSUMERS + PRODUCERS;
    static constexpr int STRIPS = CONSUMERS / WARP, BN = STRIP * STRIPS;
    static constexpr int GROUP = 2;  // steps between two commits
    // Few rows are a matter of words under way and of decoding, for which two programs have more warps.
    static constexpr int PROGRAMS = BM <= 32 ? 2 : 1;
    // 65,536 registers: what consumers take beyond the even share, producers have given back.
    static constexpr int CONSUMER_REGISTERS = PROGRAMS == 2 ? 104 : 232, PRODUCER_REGISTERS = PROGRAMS == 2 ? 32 : 40;

    static constexpr int BOX_COLUMNS = 64, BOX_BYTES = BM * BOX_COLUMNS * 2, X_BYTES = BOX_BYTES * TURN / BOX_COLUMNS;
    static constexpr int LOW_BYTES = 256 * Codec::LOW, HIGH_BYTES = 256 * Codec::HIGH;  // of a strip
    // At most; 32 columns with fp32 scales have 4 x 16 of them.
    static constexpr int SCALE_BYTES = SCALING == Scaling::grid      ? 0
                                       : SCALING == Scaling::single  ? 256
                                       : SCALING == Scaling::weights ? 128
                                       : PIECE == 0                  ? 0
                                                                     : 128;
    static constexpr int ZERO_BYTES = Codec::HAS_ZERO && PIECE > 0 ? 64 : 0;
    static constexpr int LOW_AT = X_BYTES, HIGH_AT = LOW_AT + STRIPS * LOW_BYTES, SCALES_AT = HIGH_AT + STRIPS * HIGH_BYTES;
    static constexpr int ZEROS_AT = SCALES_AT + STRIPS * SCALE_BYTES;
    // The swizzle repeats after 1024 bytes, so stages begin at multiples.
    static constexpr int STAGE_BYTES = (ZEROS_AT + STRIPS * ZERO_BYTES + 1023) / 1024 * 1024;
    static constexpr int ROOM = (228 / PROGRAMS - 1) * 1024;  // CUDA keeps 1 KB of a program's
    static constexpr int MAP_BYTES = SCALING == Scaling::twice ? 1024 : 0;  // of double quantization
    static constexpr int TAIL_BYTES = 256 + MAP_BYTES;        // barriers, a flag, the map
    static constexpr int FITTING = (ROOM - TAIL_BYTES - Codec::TABLE_BYTES) / STAGE_BYTES;
    static constexpr int STAGES = FITTING < 8 ? FITTING : 8;
    static constexpr int BARRIERS_AT = Codec::TABLE_BYTES + STAGES * STAGE_BYTES;
    static constexpr int FLAG_AT = BARRIERS_AT + 16 * STAGES;
    static constexpr int MAP_AT = BARRIERS_AT + 256;
    static constexpr int SHARED_BYTES = BARRIERS_AT + TAIL_BYTES;
    static_assert(STAGES >= 2 && FLAG_AT + 4 <= MAP_AT);
    static constexpr int PIECES = PIECE > 0 ? STEPS / PIECE : 1;  // of a turn
    static_assert(BOX_BYTES % 1024 == 0 && Codec::TABLE_BYTES % 1024 == 0);
    static_assert(PIECE % GROUP == 0 && PIECE <= STEPS);
    static_assert(SCALING != Scaling::weights || PIECE == 0);
};

// Blocks of y are numbered along M first: neighbours share their weights in the second-level cache.
template <int BM, int BN>
struct TilePlace {
    int first_n, first_m;

    QL_DEVICE TilePlace(int block, int m) {
        int across = (m + BM - 1) / BM;
        first_n = block / across * BN, first_m = block % across * BM;
    }
};

// A ring of stages: both sides count through it, turn by turn, for as long as they run.
template <int STAGES>
struct Ring {
    int slot = 0, parity = 0;

    QL_DEVICE void advance() {
        slot = slot == STAGES - 1 ? 0 : slot + 1;
        parity ^= slot == 0;
    }
};

}  // namespace quantlib::cuda

// Sizes of scaled_fp8: what a block and a stage are, and in which order a program goes through its blocks.
#pragma once

#include "../common/meeting.h"
#include "../common/ptx90.h"

namespace quantlib::cuda {

constexpr int SCALED_COLUMNS = 128;  // of a turn: K of one scale, and of one row of a stage

enum class ResultType : int { fp16, bf16, fp32 };

struct ScaledFp8Arguments {
    TensorMap x, w;                // codes: boxes of a block's rows and 128 columns
    TensorMap x_scales, w_scales;  // fp32, a row for each turn or one for all: boxes of a block's numbers
    int x_step, w_step;            // rows of scales from turn to turn: 1, or 0 where there is one for all
    int m, n;
    std::byte* y;                  // [m, n] contiguous, at a multiple of 8 bytes
    const std::byte* bias;         // [n] of y's type, or null
    ResultType result;
    Schedule schedule;
};

// W_FIRST: rows of W are the A operand of wgmma, 64 to an instruction, and rows of x its B; otherwise the other way round.
// STRIPS: times 64 rows of A for each of two warpgroups; COLUMNS: rows of B.
// BLOCKS: W has a scale per 128 x 128, else one per row and 128.
template <bool W_FIRST_, int STRIPS_, int COLUMNS_, bool BLOCKS_>
struct ScaledFp8Config {
    static constexpr bool W_FIRST = W_FIRST_, BLOCKS = BLOCKS_;
    static constexpr int STRIPS = STRIPS_, COLUMNS = COLUMNS_;
    static constexpr int GROUPS = 2, CONSUMERS = 128 * GROUPS, PRODUCERS = 128, THREADS = CONSUMERS + PRODUCERS;
    static constexpr int ROWS = 64 * STRIPS * GROUPS;
    static constexpr int BM = W_FIRST ? COLUMNS : ROWS, BN = W_FIRST ? ROWS : COLUMNS;
    static_assert(BN == 128, "a block of y has one block of scales of W in a turn");
    // 65,536 registers: what consumers take beyond the even share, producers have given back.
    static constexpr int CONSUMER_REGISTERS = 232, PRODUCER_REGISTERS = 40;

    static constexpr int STRIP_BYTES = 64 * SCALED_COLUMNS;
    static constexpr int X_BYTES = BM * SCALED_COLUMNS, W_BYTES = BN * SCALED_COLUMNS;
    // A tensor copy brings 16 bytes at least, and goes to a multiple of 128.
    static constexpr int X_SCALES = BM, W_SCALES = BLOCKS ? 4 : BN;
    static constexpr int X_AT = 0, W_AT = X_BYTES, X_SCALES_AT = W_AT + W_BYTES;
    static constexpr int W_SCALES_AT = X_SCALES_AT + (4 * X_SCALES + 127) / 128 * 128;
    static constexpr int COPIED_BYTES = X_BYTES + W_BYTES + 4 * (X_SCALES + W_SCALES);
    // The swizzle repeats after 1024 bytes, so stages begin at multiples.
    static constexpr int STAGE_BYTES = (W_SCALES_AT + 4 * W_SCALES + 1023) / 1024 * 1024;
    static_assert(X_BYTES % 1024 == 0 && W_BYTES % 1024 == 0);
    static constexpr int TAIL_BYTES = 256;  // barriers and a flag
    static constexpr int FITTING = (227 * 1024 - TAIL_BYTES) / STAGE_BYTES;
    static constexpr int STAGES = FITTING < 8 ? FITTING : 8;
    static constexpr int BARRIERS_AT = STAGES * STAGE_BYTES, FLAG_AT = BARRIERS_AT + 16 * STAGES;
    static constexpr int SHARED_BYTES = BARRIERS_AT + TAIL_BYTES;
    static_assert(STAGES >= 3);

    static constexpr int FIRST_AT = W_FIRST ? W_AT : X_AT, SECOND_AT = W_FIRST ? X_AT : W_AT;
    static constexpr int FIRST_SCALES_AT = W_FIRST ? W_SCALES_AT : X_SCALES_AT;
    static constexpr int SECOND_SCALES_AT = W_FIRST ? X_SCALES_AT : W_SCALES_AT;
    static constexpr bool FIRST_BLOCKS = W_FIRST && BLOCKS, SECOND_BLOCKS = !W_FIRST && BLOCKS;
};

// Blocks of y are numbered so that neighbours find each other's operands in the second-level cache: bands of BAND blocks of W
// run down x together.
template <int BM, int BN>
struct ScaledFp8Place {
    static constexpr int BAND = 16;
    int first_m, first_n;

    QL_DEVICE ScaledFp8Place(int block, int m, int n) {
        int down = (m + BM - 1) / BM, across = (n + BN - 1) / BN;
        int band = block / (BAND * down), within = block % (BAND * down);
        int width = across - band * BAND < BAND ? across - band * BAND : BAND;
        first_m = within / width * BM, first_n = (band * BAND + within % width) * BN;
    }
};

// The shares of a program, one after the other. Where blocks stay whole, programs take turns with them, and those that run at
// the same time are neighbours; where blocks are shared, a program's units follow each other (common/meeting.h).
struct Walk {
    const Schedule& schedule;
    bool whole;
    int64_t unit, stop;

    QL_DEVICE explicit Walk(const Schedule& schedule) : schedule(schedule) {
        int64_t all = int64_t(schedule.blocks) * schedule.turns;
        whole = schedule.each % schedule.turns == 0;
        unit = int64_t(block_x()) * (whole ? schedule.turns : schedule.each);
        stop = whole || unit + schedule.each > all ? all : unit + schedule.each;
    }

    QL_DEVICE bool more() const { return unit < stop; }
    QL_DEVICE Share share() const { return Share(schedule, unit, stop); }
    QL_DEVICE void advance(const Share& share) {
        unit += whole ? int64_t(grid_x()) * schedule.turns : share.end - share.begin;
    }
};

}  // namespace quantlib::cuda

// y [M, N] = x [M, K] W^T for up to a few hundred rows of x, W in the fragments layout, on tensor cores of one warp (sm_80 and
// later).
//
// The transpose is computed, y^T = W x^T: a strip of 16 rows of W is the A operand of mma m16n8k16, decoded in the registers of
// the lane that its words were packed for; x^T is the B operand. WN x WK warps: each has a strip of its own, and the WK of them that
// share one take turns of 128 columns. Everything comes through asynchronous copies, STAGES - 1 stages ahead:
//
//     stage    x: WK pieces [BM rows][128 columns], 16-byte chunks under an XOR of the row     | words, scales, zeros of each warp
//     loop     wait for the oldest stage, barrier | copy a stage into the slot freed by the last turn | decode, multiply
//
// Scales of blocks of 32 columns and more multiply fp32 sums: `part` holds the current block's products, `sums` the finished ones.
// Blocks of y are shared between programs where they are fewer than the chip runs (common/meeting.h).
#pragma once

#include "../common/decode.h"
#include "../common/meeting.h"
#include "../common/scales.h"

namespace quantlib::cuda {

template <class Codec_, class T_, Scaling SCALING_, int BM_, int WN_, int WK_>
struct LinearConfig {
    using Codec = Codec_;
    using T = T_;
    static constexpr Scaling SCALING = SCALING_;
    static constexpr int BM = BM_, WN = WN_, WK = WK_;
    static constexpr int WARPS = WN * WK, THREADS = 32 * WARPS;
    static constexpr int BN = STRIP * WN;
    static constexpr int X_BYTES = BM * TURN * 2;  // of one piece
    static constexpr int LOW_BYTES = Plane<Codec::LOW>::BYTES;
    static constexpr int HIGH_BYTES = Codec::HIGH > 0 ? 256 * Codec::HIGH : 0;
    static constexpr int SCALE_BYTES = 128, ZERO_BYTES = Codec::HAS_ZERO ? 64 : 0;
    static constexpr int WARP_BYTES = LOW_BYTES + HIGH_BYTES + SCALE_BYTES + ZERO_BYTES;
    static constexpr int STAGE_BYTES = WK * X_BYTES + WARPS * WARP_BYTES;
    static constexpr int ROOM = 99 * 1024;  // what every chip since sm_80 gives a program
    static constexpr int FITTING = (ROOM - Codec::TABLE_BYTES) / STAGE_BYTES;
    static constexpr int STAGES = FITTING < 4 ? FITTING : 4;
    static constexpr int SHARED_BYTES = Codec::TABLE_BYTES + STAGES * STAGE_BYTES;
    // The sums of the WK warps that share a strip meet here, after the loop.
    static constexpr int ROW_FLOATS = BN + 4;
    static_assert(STAGES >= 2);
    static_assert(WK * BM * ROW_FLOATS * 4 + 16 <= SHARED_BYTES);
    static_assert(BM % 8 == 0 && THREADS % BN == 0 && BM % (THREADS / BN) == 0);
};

template <class Config>
struct LinearFrag {
    using Codec = typename Config::Codec;
    using T = typename Config::T;
    static constexpr int BM = Config::BM, WN = Config::WN, WK = Config::WK, STAGES = Config::STAGES, TILES_M = BM / 8;

    const LinearArguments& args;
    const FragmentWeight& w;
    std::byte* stages;
    int lane, warp, wn, wk;
    BlockScales<Config::SCALING> scales;
    StripWords zero_words;
    Codec codec;

    float sums[TILES_M][4], part[TILES_M][4];

    QL_DEVICE LinearFrag(const LinearArguments& args, std::byte* table)
        : args(args),
          w(args.weight),
          stages(table + Codec::TABLE_BYTES),
          lane(thread() % 32),
          warp(thread() / 32),
          wn(warp % WN),
          wk(warp / WN),
          scales(w, lane),
          zero_words(w, 1, lane),
          codec(w, table, lane) {}

    // One stage: turn `turn` of every warp (stage * WK + wk), its words and x.
    QL_DEVICE void copy_stage(int slot, int strip, int first_m, int stage) const {
        std::byte* at = stages + slot * Config::STAGE_BYTES;
        constexpr int CHUNKS = WK * BM * 16;  // of 16 bytes
#pragma unroll
        for (int first = 0; first < CHUNKS; first += Config::THREADS) {
            int i = first + thread();
            if (CHUNKS % Config::THREADS == 0 || i < CHUNKS) {
                int chunk = i % 16, row = i / 16 % BM, piece = i / (16 * BM);
                int column = (stage * WK + piece) * TURN + 8 * chunk, m = first_m + row;
                std::byte* to = at + piece * Config::X_BYTES + row * 256 + 16 * (chunk ^ (row & 7));
                copy_async<16>(to, args.x + 2 * (m * args.x_stride + column), m < args.m && column < w.k);
            }
        }
        std::byte* mine = at + WK * Config::X_BYTES + warp * Config::WARP_BYTES;
        int turn = stage * WK + wk;
        int64_t row_bits = int64_t(w.tiles) * w.tile_columns * 2;  // bytes of a strip per bit
        int64_t before = int64_t(turn) * 256;
        copy_plane<Codec::LOW>(mine, w.planes[0], strip, row_bits, before);
        if constexpr (Codec::HIGH > 0) copy_plane<Codec::HIGH>(mine + Config::LOW_BYTES, w.planes[1], strip, row_bits, before);
        std::byte* entries = mine + Config::LOW_BYTES + Config::HIGH_BYTES;
        scales.copy(entries, strip, turn, lane);
        if constexpr (Codec::HAS_ZERO) {
            if (w.zeros != nullptr) zero_words.copy(entries + Config::SCALE_BYTES, w.zeros, strip, turn, lane);
        }
    }

    template <int BITS>
    QL_DEVICE void copy_plane(std::byte* shared, const std::byte* plane, int strip, int64_t row_bits, int64_t before) const {
        Plane<BITS>::copy(shared, plane + (strip * row_bits + before) * BITS, (row_bits - before) * BITS, lane);
    }

    // x^T of one step: B fragments of TILES_M tiles of 8 rows of x.
    QL_DEVICE void load_x(uint32_t (&b)[TILES_M][2], const std::byte* piece, int step) const {
        if constexpr (TILES_M == 1) {
            int row = lane & 7, chunk = 2 * step + (lane >> 3 & 1);
            load_matrix_x2(b[0], piece + row * 256 + 16 * (chunk ^ row));
        } else {
#pragma unroll
            for (int j = 0; j < TILES_M; j += 2) {
                // Matrices: (tile j, k low), (j, k high), (j + 1, k low), (j + 1, k high).
                int row = 8 * j + (lane >> 4) * 8 + (lane & 7), chunk = 2 * step + (lane >> 3 & 1);
                uint32_t four[4];
                load_matrix_x4(four, piece + row * 256 + 16 * (chunk ^ (row & 7)));
                b[j][0] = four[0], b[j][1] = four[1], b[j + 1][0] = four[2], b[j + 1][1] = four[3];
            }
        }
    }

    // One warp's turn: decode and multiply 128 columns of its strip.
    QL_DEVICE void multiply(const std::byte* stage, int strip, int turn) {
        const std::byte* piece = stage + wk * Config::X_BYTES;
        const std::byte* mine = stage + WK * Config::X_BYTES + warp * Config::WARP_BYTES;
        const std::byte* entries = mine + Config::LOW_BYTES + Config::HIGH_BYTES;
        uint32_t low[Plane<Codec::LOW>::WORDS], high[Codec::HIGH > 0 ? 2 * Codec::HIGH : 1] = {};
        Plane<Codec::LOW>::read(low, mine, w.tile_columns == TURN, lane);
        if constexpr (Codec::HIGH > 0) Plane<Codec::HIGH>::read(high, mine + Config::LOW_BYTES, true, lane);
        uint32_t scale = 0;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint32_t a[4], b[TILES_M][2];
            if constexpr (Config::SCALING == Scaling::weights) {
                if (step % 4 == 0) {
                    scale = codec.own_scale(load_shared<Words2>(entries + 64 * (step / 4) + 8 * (lane >> 2)));
                }
                codec.operand(a, low[step], shuffle_quad(scale, step % 4));
            } else {
                if constexpr (Codec::HAS_ZERO) {
                    if (w.zeros != nullptr && (step & ((1 << scales.log_steps) - 1)) == 0) set_zeros(entries, step);
                }
                codec.operand(a, low, high, step);
            }
            load_x(b, piece, step);
            if constexpr (Config::SCALING == Scaling::weights) {
#pragma unroll
                for (int j = 0; j < TILES_M; ++j) mma_16816<T>(sums[j], a, b[j]);
            } else {
#pragma unroll
                for (int j = 0; j < TILES_M; ++j) mma_16816<T>(part[j], a, b[j]);
                bool may_end = step % 2 == 1;  // blocks of 32 columns and more
                if (may_end && ((step + 1) & ((1 << scales.log_steps) - 1)) == 0) {
                    int e = step >> scales.log_steps;
                    SharedEntries shared = {entries};
                    finish_block(scales.number(shared, e, 0, strip, turn), scales.number(shared, e, 1, strip, turn));
                }
            }
        }
    }

    QL_DEVICE void set_zeros(const std::byte* entries, int step) {
        const std::byte* at = entries + Config::SCALE_BYTES + zero_words.place(step >> scales.log_steps);
        codec.set_zero(0, w.offset + load_shared<uint8_t>(at));
        codec.set_zero(1, w.offset + load_shared<uint8_t>(at + zero_words.row_bytes));
    }

    QL_DEVICE void finish_block(float scale0, float scale1) {
#pragma unroll
        for (int j = 0; j < TILES_M; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[j][i] = multiply_add(part[j][i], i < 2 ? scale0 : scale1, sums[j][i]);
                part[j][i] = 0.0f;
            }
        }
    }

    // The turns [begin, end) of the block's strip, summed up by every warp for itself.
    QL_DEVICE void run(int strip, int first_m, int begin, int end) {
#pragma unroll
        for (int j = 0; j < TILES_M; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[j][i] = part[j][i] = 0.0f;
        }
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s) {
            if (begin + s < end) copy_stage(s, strip, first_m, begin + s);
            copy_async_commit();
        }
        int slot = 0;
        QL_STEADY(true);
        for (int stage = begin; stage < end; ++stage) {
            copy_async_wait<STAGES - 2>();
            sync_threads();
            int ahead = stage + STAGES - 1, free = slot == 0 ? STAGES - 1 : slot - 1;
            if (ahead < end) copy_stage(free, strip, first_m, ahead);
            copy_async_commit();
            multiply(stages + slot * Config::STAGE_BYTES, strip, stage * WK + wk);
            slot = slot == STAGES - 1 ? 0 : slot + 1;
        }
        QL_STEADY(false);
        copy_async_wait<0>();
        sync_threads();
        if (scales.log_steps == 4) finish_block(1.0f, 1.0f);
    }

    // Sums of all warps -> numbers of y, thread by thread: column n = thread % BN of the block, rows m = thread / BN + i * ROWS.
    static constexpr int ROWS = Config::THREADS / Config::BN, COUNT = BM / ROWS;

    QL_DEVICE void gather(float (&found)[COUNT]) {
        int row = STRIP * wn + (lane >> 2), column = (lane & 3) * 2;
        std::byte* piece = stages - Codec::TABLE_BYTES + 16 + wk * (BM * Config::ROW_FLOATS * 4);
#pragma unroll
        for (int j = 0; j < TILES_M; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int m = 8 * j + column + i % 2, n = row + 8 * (i / 2);
                store_shared(piece + 4 * (m * Config::ROW_FLOATS + n), sums[j][i]);
            }
        }
        sync_threads();
        int n = thread() % Config::BN, m = thread() / Config::BN;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const std::byte* at = stages - Codec::TABLE_BYTES + 16 + 4 * ((m + i * ROWS) * Config::ROW_FLOATS + n);
            found[i] = 0.0f;
#pragma unroll
            for (int k = 0; k < WK; ++k) found[i] += load_shared<float>(at + k * (BM * Config::ROW_FLOATS * 4));
        }
        sync_threads();
    }

    QL_DEVICE float row_scale(int n) const {
        if constexpr (Config::SCALING == Scaling::weights) return multiply_rounded(load_global<float>(w.absmax), Codec::MISSING);
        return scales.of_row(n);
    }

    QL_DEVICE void store(const float (&found)[COUNT], int first_n, int first_m) const {
        int n = first_n + thread() % Config::BN;
        if (n >= w.n) return;
        float scale = row_scale(n), bias = args.bias == nullptr ? 0.0f : low<T>(load_global<uint16_t>(args.bias + 2 * n));
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            int m = first_m + thread() / Config::BN + i * ROWS;
            if (m >= args.m) return;
            int64_t at = 2 * (int64_t(m) * w.n + n);
            float value = add_rounded(multiply_rounded(found[i], scale), bias);
            if (args.residual != nullptr) value += low<T>(load_global<uint16_t>(args.residual + at));
            store_global(args.y + at, uint16_t(pack2<T>(value, 0.0f)));
        }
    }
};

// Grid: (programs). Blocks of y are numbered along M first: neighbours share their weights in the second-level cache.
template <class Config>
QL_KERNEL(Config::THREADS, (Config::BM <= 16 ? 2 : 1)) linear_frag_kernel(const LinearArguments args) {
    std::byte* shared = shared_memory();
    if constexpr (Config::Codec::TABLE_BYTES > 0) {
        Config::Codec::fill(shared, args.weight, thread(), Config::THREADS);
        sync_threads();
    }
    int blocks_m = (args.m + Config::BM - 1) / Config::BM;
    int64_t unit = int64_t(block_x()) * args.schedule.each;
    int64_t all = int64_t(args.schedule.blocks) * args.schedule.turns;
    int64_t stop = unit + args.schedule.each < all ? unit + args.schedule.each : all;
    while (unit < stop) {
        Share share(args.schedule, unit, stop);
        int first_n = share.block / blocks_m * Config::BN, first_m = share.block % blocks_m * Config::BM;
        int strip = first_n / STRIP + thread() / WARP % Config::WN, last = (args.weight.n - 1) / STRIP;
        if (strip > last) strip = last;
        LinearFrag<Config> program(args, shared);
        program.run(strip, first_m, share.begin, share.end);
        float found[LinearFrag<Config>::COUNT];
        program.gather(found);
        if (meet<Config::THREADS>(args.schedule, share, found, shared)) program.store(found, first_n, first_m);
        unit += share.end - share.begin;
        if constexpr (Config::Codec::TABLE_BYTES > 0) {
            if (unit < stop) {
                sync_threads();
                Config::Codec::fill(shared, args.weight, thread(), Config::THREADS);
            }
        }
        sync_threads();
    }
}

}  // namespace quantlib::cuda

// dX [M, K] = dY [M, N] W from the forward pass's fragments: no second copy of W, nothing quantized again.
//
// The sum runs over rows of W. A strip's 16 rows are the k of mma m16n8k16, 8 of its columns the n: the registers that decoding
// leaves hold 8x8 matrices by rows of W, and the B operand wants them by columns, so that each is turned over in registers
// (movmatrix). No decoded weight goes through shared memory and no warp waits for another's: a warp has 64 columns of W of its own,
// for all BM rows of dY. Scales differ from row to row of W, inside the sum, so that they are multiplied into the weights, as the
// law does. A stage is 4 strips: dY [BM][64] under an XOR of the row, and the words of each warp, both by asynchronous copies.
#pragma once

#include "../common/decode.h"
#include "../common/meeting.h"
#include "../common/scales.h"

namespace quantlib::cuda {

// A code book of 16 in fp32: each lane has a copy of its own in its own bank.
template <class T>
struct WideTable {
    static constexpr int LOW = 4, HIGH = 0;
    static constexpr bool HAS_ZERO = false;
    static constexpr int TABLE_BYTES = 16 * 32 * 4;
    const std::byte* mine;
    uint32_t mask;

    QL_DEVICE WideTable(const FragmentWeight&, const std::byte* table, int lane) : mine(table + 4 * lane) { mask = kept(0x780); }

    QL_DEVICE static void fill(std::byte* table, const FragmentWeight& w, int thread, int threads) {
        for (int i = thread; i < 16 * 32; i += threads) store_shared(table + 4 * i, load_global<float>(w.table + i / 32));
    }

    // Code p of both halves of a word, in fp32.
    QL_DEVICE void numbers(float (&found)[2], uint32_t word, int p) const {
        found[0] = load_shared<float>(mine + (turned(word, 4 * p) & mask));
        found[1] = load_shared<float>(mine + (turned(word, 4 * p + 16) & mask));
    }

  private:
    // The code at `bit` moved to bits 7 .. 10.
    QL_DEVICE static uint32_t turned(uint32_t word, int bit) { return bit < 7 ? word << (7 - bit) : word >> (bit - 7); }
};

template <class Codec_, class T_, Scaling SCALING_, int BM_>
struct DgradConfig {
    using Codec = Codec_;
    using T = T_;
    static constexpr Scaling SCALING = SCALING_;
    static constexpr int BM = BM_, WARPS = 8, THREADS = 32 * WARPS;
    static constexpr int STRIPS = 4, BN = STRIP * STRIPS, COLUMNS = 64, BK = COLUMNS * WARPS;
    static constexpr int DY_BYTES = BM * BN * 2;
    static constexpr int LOW_BYTES = 128 * Codec::LOW, HIGH_BYTES = 128 * Codec::HIGH;  // of a strip, for 64 columns
    static constexpr int SCALE_BYTES = 128, ZERO_BYTES = Codec::HAS_ZERO ? 64 : 0;
    static constexpr int STRIP_BYTES = LOW_BYTES + HIGH_BYTES + SCALE_BYTES + ZERO_BYTES;
    static constexpr int STAGE_BYTES = DY_BYTES + WARPS * STRIPS * STRIP_BYTES;
    static constexpr int FIXED_BYTES = Codec::TABLE_BYTES + 16;
    static constexpr int FITTING = (99 * 1024 - FIXED_BYTES) / STAGE_BYTES;
    static constexpr int STAGES = FITTING < 4 ? FITTING : 4;
    static constexpr int SHARED_BYTES = FIXED_BYTES + STAGES * STAGE_BYTES;
    static_assert(STAGES >= 2);
};

template <class Config>
struct DgradFrag {
    using Codec = typename Config::Codec;
    using T = typename Config::T;
    static constexpr int BM = Config::BM, STAGES = Config::STAGES, TILES_M = BM / 16, TILES_K = Config::COLUMNS / 8;
    static constexpr int LOW = Codec::LOW, HIGH = Codec::HIGH, COUNT = TILES_M * TILES_K * 4;

    const DgradArguments& args;
    const FragmentWeight& w;
    std::byte* stages;
    int lane, warp, last_strip;
    BlockScales<Config::SCALING> scales;
    StripWords zero_words;
    Codec codec;
    float sums[COUNT];  // [TILES_M][TILES_K][4]

    QL_DEVICE DgradFrag(const DgradArguments& args, std::byte* table)
        : args(args),
          w(args.weight),
          stages(table + Config::FIXED_BYTES),
          lane(thread() % WARP),
          warp(thread() / WARP),
          last_strip((args.weight.n - 1) / STRIP),
          scales(w, lane),
          zero_words(w, 1, lane),
          codec(w, table, lane) {}

    // The lane's own words of 64 columns of a strip, one plane; tile: which 64 columns.
    template <int BITS>
    QL_DEVICE void copy_plane(std::byte* shared, const std::byte* plane, int strip, int tile, bool wanted) const {
        const int64_t strip_bytes = int64_t(w.tiles) * w.tile_columns * 2 * BITS;
        const std::byte* from = plane + strip * strip_bytes + int64_t(tile >> 1) * Plane<BITS>::BYTES;
        const bool wide = w.tile_columns == TURN;
        const int half = tile & 1;
        wanted = wanted && int64_t(tile) * 64 < int64_t(w.tiles) * w.tile_columns;
        if constexpr (BITS == 1) {
            copy_async<4>(shared + 4 * lane, from + 8 * lane + 4 * half, wanted);
        } else if constexpr (BITS == 2) {
            copy_async<8>(shared + 8 * lane, from + 16 * lane + 8 * half, wanted);
        } else if constexpr (BITS == 4) {
            copy_async<16>(shared + 16 * lane, from + 16 * (wide ? 2 * lane + half : 32 * half + lane), wanted);
        } else {
#pragma unroll
            for (int g = 0; g < 2; ++g) {
                int i = wide ? 64 * g + 2 * lane + half : 64 * half + 32 * g + lane;
                copy_async<16>(shared + 512 * g + 16 * lane, from + 16 * i, wanted);
            }
        }
    }

    // Words as Plane::read leaves those of a turn, for one half of it.
    template <int BITS>
    QL_DEVICE void read_plane(uint32_t* words, const std::byte* shared) const {
        if constexpr (BITS == 1) {
            words[0] = load_shared<uint32_t>(shared + 4 * lane);
        } else if constexpr (BITS == 2) {
            Words2 found = load_shared<Words2>(shared + 8 * lane);
            words[0] = found.w[0], words[1] = found.w[1];
        } else {
#pragma unroll
            for (int g = 0; g < BITS / 4; ++g) {
                Words4 found = load_shared<Words4>(shared + 512 * g + 16 * lane);
#pragma unroll
                for (int i = 0; i < 4; ++i) words[4 * g + i] = found.w[i];
            }
        }
    }

    QL_DEVICE std::byte* strip_room(std::byte* stage, int s) const {
        return stage + Config::DY_BYTES + (warp * Config::STRIPS + s) * Config::STRIP_BYTES;
    }

    QL_DEVICE void copy_stage(int slot, int first_m, int tile, int turn) const {
        std::byte* stage = stages + slot * Config::STAGE_BYTES;
        constexpr int CHUNKS = BM * 8;
#pragma unroll
        for (int first = 0; first < CHUNKS; first += Config::THREADS) {
            int i = first + thread();
            if (CHUNKS % Config::THREADS == 0 || i < CHUNKS) {
                int chunk = i % 8, row = i / 8, n = turn * Config::BN + 8 * chunk, m = first_m + row;
                copy_async<16>(stage + row * 128 + 16 * (chunk ^ (row & 7)), args.dy + 2 * (m * args.dy_stride + n),
                               m < args.m && n < w.n);
            }
        }
#pragma unroll
        for (int s = 0; s < Config::STRIPS; ++s) {
            int strip = turn * Config::STRIPS + s;
            bool wanted = strip <= last_strip;
            if (!wanted) strip = last_strip;  // dY is 0 there; words of zeros decode to finite numbers
            std::byte* room = strip_room(stage, s);
            copy_plane<LOW>(room, w.planes[0], strip, tile, wanted);
            if constexpr (HIGH > 0) copy_plane<HIGH>(room + Config::LOW_BYTES, w.planes[1], strip, tile, wanted);
            room += Config::LOW_BYTES + Config::HIGH_BYTES;
            scales.copy(room, strip, tile >> 1, lane);
            if constexpr (Codec::HAS_ZERO) {
                if (w.zeros != nullptr) zero_words.copy(room + Config::SCALE_BYTES, w.zeros, strip, tile >> 1, lane);
            }
        }
    }

    // Scaled weights of one step, in the A operand's order.
    QL_DEVICE void decode(uint32_t (&a)[4], const uint32_t* low, const uint32_t* high, int step, const float (&scale)[2]) {
        if constexpr (Codec::TABLE_BYTES > 0) {
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                float number[2];
                codec.numbers(number, low[step], p);
                a[p] = pack2<T>(multiply_rounded(number[0], scale[p % 2]), multiply_rounded(number[1], scale[p % 2]));
            }
        } else {
            codec.operand(a, low, high, step);
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                a[p] = pack2<T>(multiply_rounded(low_of(a[p]), scale[p % 2]), multiply_rounded(high_of(a[p]), scale[p % 2]));
            }
        }
    }

    QL_DEVICE static float low_of(uint32_t pair) { return quantlib::cuda::low<T>(pair); }
    QL_DEVICE static float high_of(uint32_t pair) { return quantlib::cuda::high<T>(pair); }

    QL_DEVICE void multiply(std::byte* stage, int tile, int turn) {
#pragma unroll 1
        for (int s = 0; s < Config::STRIPS; ++s) {
            int strip = turn * Config::STRIPS + s;
            if (strip > last_strip) return;
            const std::byte* room = strip_room(stage, s);
            SharedEntries entries = {room + Config::LOW_BYTES + Config::HIGH_BYTES};
            uint32_t low[LOW], high[HIGH > 0 ? HIGH : 1] = {};
            read_plane<LOW>(low, room);
            if constexpr (HIGH > 0) read_plane<HIGH>(high, room + Config::LOW_BYTES);
            uint32_t gradient[TILES_M][4];
#pragma unroll
            for (int i = 0; i < TILES_M; ++i) {
                int row = 16 * i + lane % 16, chunk = 2 * s + lane / 16;
                load_matrix_x4(gradient[i], stage + row * 128 + 16 * (chunk ^ (row & 7)));
            }
            float scale[2] = {1.0f, 1.0f};
            uint32_t own = 0;
            if constexpr (Config::SCALING == Scaling::weights) {
                own = codec.own_scale(load_shared<Words2>(entries.begin + 64 * (tile & 1) + 8 * (lane >> 2)));
            } else if (w.scale_home != ScaleHome::strip && w.scale_home != ScaleHome::grid) {
                scale[0] = scales.of_row(strip * STRIP + (lane >> 2)), scale[1] = scales.of_row(strip * STRIP + (lane >> 2) + 8);
            }
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                uint32_t a[4];
                if constexpr (Config::SCALING == Scaling::weights) {
                    codec.operand(a, low[step], shuffle_quad(own, step));
                } else {
                    // Blocks of 32 columns and more begin at even steps.
                    if (step % 2 == 0 && scales.log_steps < 4 && (step & ((1 << scales.log_steps) - 1)) == 0) {
                        int e = (4 * (tile & 1) + step) >> scales.log_steps;
                        scale[0] = scales.number(entries, e, 0, strip, tile >> 1);
                        scale[1] = scales.number(entries, e, 1, strip, tile >> 1);
                        if constexpr (Codec::HAS_ZERO) {
                            if (w.zeros != nullptr) set_zeros(entries, e);
                        }
                    }
                    decode(a, low, high, step, scale);
                }
#pragma unroll
                for (int g = 0; g < 2; ++g) {
                    uint32_t b[2] = {transpose_matrix(a[2 * g]), transpose_matrix(a[2 * g + 1])};
#pragma unroll
                    for (int i = 0; i < TILES_M; ++i) multiply_tile(i, 2 * step + g, gradient[i], b);
                }
            }
        }
    }

    QL_DEVICE void multiply_tile(int i, int j, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        float d[4];
        float* at = sums + (i * TILES_K + j) * 4;
#pragma unroll
        for (int k = 0; k < 4; ++k) d[k] = at[k];
        mma_16816<T>(d, a, b);
#pragma unroll
        for (int k = 0; k < 4; ++k) at[k] = d[k];
    }

    QL_DEVICE void set_zeros(const SharedEntries& entries, int e) {
        int at = Config::SCALE_BYTES + zero_words.place(e);
        codec.set_zero(0, w.offset + entries.template at<uint8_t>(at));
        codec.set_zero(1, w.offset + entries.template at<uint8_t>(at + zero_words.row_bytes));
    }

    QL_DEVICE void run(int first_m, int tile, int begin, int end) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[i] = 0.0f;
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s) {
            if (begin + s < end) copy_stage(s, first_m, tile, begin + s);
            copy_async_commit();
        }
        int slot = 0;
        QL_STEADY(true);
        for (int turn = begin; turn < end; ++turn) {
            copy_async_wait<STAGES - 2>();
            sync_threads();
            int ahead = turn + STAGES - 1, free = slot == 0 ? STAGES - 1 : slot - 1;
            if (ahead < end) copy_stage(free, first_m, tile, ahead);
            copy_async_commit();
            multiply(stages + slot * Config::STAGE_BYTES, tile, turn);
            slot = slot == STAGES - 1 ? 0 : slot + 1;
        }
        QL_STEADY(false);
        copy_async_wait<0>();
        sync_threads();
        if constexpr (Config::SCALING == Scaling::weights) {
            float missing = multiply_rounded(load_global<float>(w.absmax), Codec::MISSING);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) sums[i] = multiply_rounded(sums[i], missing);
        }
    }

    QL_DEVICE void store(int first_m, int tile) const {
#pragma unroll
        for (int i = 0; i < TILES_M; ++i) {
#pragma unroll
            for (int j = 0; j < TILES_K; ++j) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    int m = first_m + 16 * i + (lane >> 2) + 8 * h, k = tile * Config::COLUMNS + 8 * j + 2 * (lane & 3);
                    const float* pair = sums + (i * TILES_K + j) * 4 + 2 * h;
                    if (m >= args.m || k >= w.k) continue;
                    std::byte* at = args.dx + 2 * (int64_t(m) * w.k + k);
                    uint32_t rounded = pack2<T>(pair[0], pair[1]);
                    if (w.k % 2 == 0) {
                        store_global(at, rounded);
                    } else {
                        store_global(at, uint16_t(rounded));
                        if (k + 1 < w.k) store_global(at + 2, uint16_t(rounded >> 16));
                    }
                }
            }
        }
    }
};

// Grid: (programs). Blocks of dX are numbered along M first.
template <class Config>
QL_KERNEL(Config::THREADS, 1) dgrad_frag_kernel(const DgradArguments args) {
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
        DgradFrag<Config> program(args, shared);
        int first_m = share.block % blocks_m * Config::BM, tile = share.block / blocks_m * Config::WARPS + program.warp;
        program.run(first_m, tile, share.begin, share.end);
        if (meet<Config::THREADS>(args.schedule, share, program.sums, shared + Config::Codec::TABLE_BYTES)) {
            program.store(first_m, tile);
        }
        unit += share.end - share.begin;
    }
}

}  // namespace quantlib::cuda

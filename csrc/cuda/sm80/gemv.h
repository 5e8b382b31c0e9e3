// y [M, N] = x [M, K] W^T for up to 8 rows of x, W in the fragments layout.
//
// Only the bytes of W count, so that nothing waits for anything: WARPS warps share a strip of 16 rows of W and take turns of 128
// columns, each streaming its words straight into registers, one turn ahead, and multiplying them by rows of x that it loads in the
// order of mma's B operand, from the first-level cache. No shared memory and no barrier before the end, where the warps' sums meet,
// and then those of programs that share the strip.
#pragma once

#include "../common/decode.h"
#include "../common/meeting.h"
#include "../common/scales.h"

namespace quantlib::cuda {

template <class Codec_, class T_, Scaling SCALING_>
struct GemvConfig {
    using Codec = Codec_;
    using T = T_;
    static constexpr Scaling SCALING = SCALING_;
    static constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 8;
    static constexpr int SHARED_BYTES = Codec::TABLE_BYTES + 16 + WARPS * ROWS * STRIP * 4;
};

template <class Config>
struct Gemv {
    using Codec = typename Config::Codec;
    using T = typename Config::T;
    static constexpr int LOW = Codec::LOW, HIGH = Codec::HIGH;

    const LinearArguments& args;
    const FragmentWeight& w;
    int lane, warp;
    BlockScales<Config::SCALING> scales;
    StripWords zero_words;
    Codec codec;
    const std::byte* row;  // of x, from this lane's columns on
    const std::byte *scale_strip, *zero_strip;
    float sums[4], part[4];

    // What one turn needs of the weight.
    struct Words {
        uint32_t low[Plane<LOW>::WORDS], high[HIGH > 0 ? 2 * HIGH : 1];
    };

    QL_DEVICE Gemv(const LinearArguments& args, const std::byte* table)
        : args(args),
          w(args.weight),
          lane(thread() % WARP),
          warp(thread() / WARP),
          scales(w, lane),
          zero_words(w, 1, lane),
          codec(w, table, lane) {
        int m = lane >> 2;
        row = args.x + 2 * ((m < args.m ? m : args.m - 1) * args.x_stride + 2 * (lane & 3));
    }

    template <int BITS>
    QL_DEVICE void load_plane(uint32_t* words, const std::byte* plane, int strip, int turn) const {
        // A turn behind the last tile is read as the last one; x is 0 there.
        const int64_t strip_bytes = int64_t(w.tiles) * w.tile_columns * 2 * BITS;
        const std::byte* from = plane + strip * strip_bytes;
        const bool wide = w.tile_columns == TURN;
        auto chunk = [&](int i) {
            int64_t at = int64_t(turn) * Plane<BITS>::BYTES + 16 * i;
            return at < strip_bytes ? at : strip_bytes - 16;
        };
        auto take = [&](int first, int i) {
            Words4 found = load_stream<Words4>(from + chunk(i));
#pragma unroll
            for (int k = 0; k < 4; ++k) words[first + k] = found.w[k];
        };
        if constexpr (BITS == 1) {
            Words2 found = load_stream<Words2>(from + chunk(lane >> 1) + 8 * (lane & 1));
            words[0] = found.w[0], words[1] = found.w[1];
        } else if constexpr (BITS == 2) {
            take(0, lane);
        } else if constexpr (BITS == 4) {
#pragma unroll
            for (int c = 0; c < 2; ++c) take(4 * c, wide ? 2 * lane + c : 32 * c + lane);
        } else {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
#pragma unroll
                for (int g = 0; g < 2; ++g) take(8 * c + 4 * g, wide ? 64 * g + 2 * lane + c : 64 * c + 32 * g + lane);
            }
        }
    }

    QL_DEVICE void load(Words& words, int strip, int turn) const {
        load_plane<LOW>(words.low, w.planes[0], strip, turn);
        if constexpr (HIGH > 0) load_plane<HIGH>(words.high, w.planes[1], strip, turn);
    }

    // Where a turn's first entries lie in a strip's, in bytes.
    QL_DEVICE static int entries_at(const StripWords& layout, int turn) {
        return ((turn << layout.log_turn_units) >> layout.log_unit_turns) * layout.unit_bytes;
    }

    QL_DEVICE void multiply(const Words& words, int strip, int turn) {
        GlobalEntries scale_entries = {scale_strip + entries_at(scales.words, turn)};
        // Blocks behind the last piece belong to columns where x is 0: they take the first one's scale.
        int pieces = scales.words.units - ((turn << scales.words.log_turn_units) >> scales.words.log_unit_turns);
        int blocks = w.scale_home == ScaleHome::strip ? pieces << scales.words.log_entries : STEPS;
        const std::byte* columns = row + 2 * TURN * turn;
        uint32_t scale = 0;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint32_t a[4], b[2] = {load_global<uint32_t>(columns + 32 * step), load_global<uint32_t>(columns + 32 * step + 16)};
            if constexpr (Config::SCALING == Scaling::weights) {
                if (step % 4 == 0) {
                    int tile = step < blocks ? step / 4 : 0;
                    scale = codec.own_scale(load_global<Words2>(scale_entries.begin + 64 * tile + 8 * (lane >> 2)));
                }
                codec.operand(a, words.low[step], shuffle_quad(scale, step % 4));
                mma_16816<T>(sums, a, b);
            } else {
                if constexpr (Codec::HAS_ZERO) {
                    if (w.zeros != nullptr && (step & ((1 << scales.log_steps) - 1)) == 0) set_zeros(turn, step, blocks);
                }
                codec.operand(a, words.low, words.high, step);
                mma_16816<T>(part, a, b);
                if (step % 2 == 1 && ((step + 1) & ((1 << scales.log_steps) - 1)) == 0) {
                    int e = step >> scales.log_steps;
                    if (e >= blocks) e = 0;
                    finish_block(scales.number(scale_entries, e, 0, strip, turn), scales.number(scale_entries, e, 1, strip, turn));
                }
            }
        }
    }

    QL_DEVICE void set_zeros(int turn, int step, int blocks) {
        int e = step >> scales.log_steps;
        const std::byte* at = zero_strip + entries_at(zero_words, turn) + zero_words.place(e < blocks ? e : 0);
        codec.set_zero(0, w.offset + load_global<uint8_t>(at));
        codec.set_zero(1, w.offset + load_global<uint8_t>(at + zero_words.row_bytes));
    }

    QL_DEVICE void finish_block(float scale0, float scale1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[i] = multiply_add(part[i], i < 2 ? scale0 : scale1, sums[i]);
            part[i] = 0.0f;
        }
    }

    // Rounds [begin, end) of WARPS turns.
    QL_DEVICE void run(int strip, int begin, int end) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = part[i] = 0.0f;
        scale_strip = w.scales + int64_t(strip) * scales.words.units * scales.words.unit_bytes;
        zero_strip = w.zeros + int64_t(strip) * zero_words.units * zero_words.unit_bytes;
        int last = (w.tiles * w.tile_columns + TURN - 1) / TURN - 1;
        Words words, next;
        int turn = begin * Config::WARPS + warp;
        load(words, strip, turn < last ? turn : last);
        // In the last round some warps may be left without a turn.
        int stop = end * Config::WARPS < last + 1 ? end * Config::WARPS : last + 1;
        QL_STEADY(true);
        while (turn < stop) {
            int ahead = turn + Config::WARPS;
            load(next, strip, ahead < last ? ahead : last);
            multiply(words, strip, turn);
            words = next;
            turn = ahead;
        }
        QL_STEADY(false);
        if (scales.log_steps == 4) finish_block(1.0f, 1.0f);
    }

    // The warps' sums -> number (m, n) of the block for thread 16 m + n, m below 8; 0 for the rest.
    QL_DEVICE float gather(std::byte* shared) const {
        int n = lane >> 2, m = 2 * (lane & 3);
        std::byte* mine = shared + 4 * STRIP * Config::ROWS * warp;
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared(mine + 4 * (STRIP * (m + i % 2) + n + 8 * (i / 2)), sums[i]);
        sync_threads();
        float found = 0.0f;
        if (thread() < STRIP * Config::ROWS) {
#pragma unroll
            for (int k = 0; k < Config::WARPS; ++k) {
                found += load_shared<float>(shared + 4 * (STRIP * Config::ROWS * k + thread()));
            }
        }
        sync_threads();
        return found;
    }

    QL_DEVICE void store(float found, int strip) const {
        int n = strip * STRIP + thread() % STRIP, m = thread() / STRIP;
        if (n >= w.n || m >= args.m) return;
        float scale;
        if constexpr (Config::SCALING == Scaling::weights) {
            scale = multiply_rounded(load_global<float>(w.absmax), Codec::MISSING);
        } else {
            scale = scales.of_row(n);
        }
        float bias = args.bias == nullptr ? 0.0f : low<T>(load_global<uint16_t>(args.bias + 2 * n));
        int64_t at = 2 * (int64_t(m) * w.n + n);
        float value = add_rounded(multiply_rounded(found, scale), bias);
        if (args.residual != nullptr) value += low<T>(load_global<uint16_t>(args.residual + at));
        store_global(args.y + at, uint16_t(pack2<T>(value, 0.0f)));
    }
};

// Grid: (programs). A block of y is one strip; a turn of the schedule is a round of all warps.
template <class Config>
QL_KERNEL(Config::THREADS, 2) gemv_kernel(const LinearArguments args) {
    std::byte* shared = shared_memory();
    if constexpr (Config::Codec::TABLE_BYTES > 0) {
        Config::Codec::fill(shared, args.weight, thread(), Config::THREADS);
        sync_threads();
    }
    std::byte* room = shared + Config::Codec::TABLE_BYTES;
    int64_t unit = int64_t(block_x()) * args.schedule.each;
    int64_t all = int64_t(args.schedule.blocks) * args.schedule.turns;
    int64_t stop = unit + args.schedule.each < all ? unit + args.schedule.each : all;
    while (unit < stop) {
        Share share(args.schedule, unit, stop);
        Gemv<Config> program(args, shared);
        program.run(share.block, share.begin, share.end);
        float found[1] = {program.gather(room + 16)};
        if (meet<Config::THREADS>(args.schedule, share, found, room)) program.store(found[0], share.block);
        unit += share.end - share.begin;
    }
}

}  // namespace quantlib::cuda

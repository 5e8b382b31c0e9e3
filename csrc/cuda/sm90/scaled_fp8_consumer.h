// Who multiplies in scaled_fp8, and writes y.
#pragma once

#include <type_traits>

#include "scaled_fp8_config.h"
#include "store_words.h"
#include "tile_meeting.h"
#include "wgmma_e4m3.h"

namespace quantlib::cuda {

// One of the 256 consumers. Of each strip of its warpgroup a lane, 4 r + q in its warp, has rows r and r + 8 of the warp's 16,
// and two of every eight columns: sum i belongs to row r + 8 (i / 2 % 2) and column 8 (i / 4) + 2 q + i % 2.
template <class Config>
struct ScaledFp8Consumer {
    static constexpr int STRIPS = Config::STRIPS, COUNT = Config::COLUMNS / 2;

    const ScaledFp8Arguments& args;
    int lane, group, row;  // row: r in the first strip, of the block's rows of A
    float sums[STRIPS * COUNT], part[COUNT];

    QL_DEVICE explicit ScaledFp8Consumer(const ScaledFp8Arguments& args) : args(args), lane(thread() % WARP) {
        group = thread() / 128;
        row = group * 64 * STRIPS + thread() % 128 / WARP * 16 + (lane >> 2);
        QL_UNROLL
        for (int i = 0; i < COUNT; ++i) part[i] = 0.0f;
    }

    QL_DEVICE float first_scale(const std::byte* stage, int strip, int h) const {
        const std::byte* scales = stage + Config::FIRST_SCALES_AT;
        return load_shared<float>(Config::FIRST_BLOCKS ? scales : scales + 4 * (row + 64 * strip + 8 * h));
    }

    // Of columns 8 j + 2 q and the next.
    QL_DEVICE void second_scales(float (&found)[2], const std::byte* stage, int j) const {
        const std::byte* scales = stage + Config::SECOND_SCALES_AT;
        if constexpr (Config::SECOND_BLOCKS) {
            found[0] = found[1] = load_shared<float>(scales);
        } else {
            Words2 bits = load_shared<Words2>(scales + 32 * j + 8 * (lane & 3));
            found[0] = from_bits(bits.w[0]), found[1] = from_bits(bits.w[1]);
        }
    }

    // The sums of 128 products in `part` join the strip's, each by its two scales. While a warpgroup does this the other one
    // has the tensor cores.
    QL_DEVICE void promote(const std::byte* stage, int strip, const float (&first)[2]) {
        QL_UNROLL
        for (int j = 0; j < COUNT / 4; ++j) {
            float second[2];
            second_scales(second, stage, j);
            QL_UNROLL
            for (int i = 0; i < 4; ++i) {
                float& sum = sums[strip * COUNT + 4 * j + i];
                sum = multiply_add(part[4 * j + i], multiply_rounded(first[i / 2], second[i % 2]), sum);
            }
        }
    }

    QL_DEVICE void multiply_turn(const std::byte* stage) {
        const std::byte* rows = stage + Config::FIRST_AT + group * STRIPS * Config::STRIP_BYTES;
        const uint64_t b = wgmma_descriptor(stage + Config::SECOND_AT);
        QL_UNROLL
        for (int strip = 0; strip < STRIPS; ++strip) {
            const uint64_t a = wgmma_descriptor(rows + strip * Config::STRIP_BYTES);
            wgmma_hold(part);
            wgmma_fence();
            wgmma_e4m3<false, Config::COLUMNS>(part, a, b);
            QL_UNROLL
            for (int k = 32; k < SCALED_COLUMNS; k += 32) {
                wgmma_e4m3<true, Config::COLUMNS>(part, wgmma_advance<1>(a, k), wgmma_advance<1>(b, k));
            }
            wgmma_commit();
            const float first[2] = {first_scale(stage, strip, 0), first_scale(stage, strip, 1)};
            wgmma_wait<0>();
            wgmma_hold(part);
            promote(stage, strip, first);
        }
    }

    // The turns of a share of a block, summed up; `ring` goes on from share to share.
    template <class Ring>
    QL_DEVICE void run(Ring& ring, std::byte* shared, int turns) {
        Barrier* full = reinterpret_cast<Barrier*>(shared + Config::BARRIERS_AT);
        Barrier* empty = full + Config::STAGES;
        QL_UNROLL
        for (int i = 0; i < STRIPS * COUNT; ++i) sums[i] = 0.0f;
        QL_STEADY(true);
        QL_NO_UNROLL
        for (int turn = 0; turn < turns; ++turn) {
            barrier_wait(full + ring.slot, ring.parity);
            multiply_turn(shared + ring.slot * Config::STAGE_BYTES);
            sync_warp();  // all lanes have read their scales
            if (lane == 0) barrier_arrive(empty + ring.slot);
            ring.advance();
        }
        QL_STEADY(false);
    }

    // Sums of the block -> y.
    QL_DEVICE void store(int first_m, int first_n) {
        if (args.result == ResultType::fp16) {
            store_as<Half>(first_m, first_n);
        } else if (args.result == ResultType::bf16) {
            store_as<Bf16>(first_m, first_n);
        } else {
            store_as<float>(first_m, first_n);
        }
    }

  private:
    QL_DEVICE int row_of(int i) const { return row + i / COUNT * 64 + i / 2 % 2 * 8; }
    QL_DEVICE int column_of(int i) const { return i % COUNT / 4 * 8 + 2 * (lane & 3) + i % 2; }
    QL_DEVICE int m_of(int i) const { return Config::W_FIRST ? column_of(i) : row_of(i); }
    QL_DEVICE int n_of(int i) const { return Config::W_FIRST ? row_of(i) : column_of(i); }

    template <class T>
    QL_DEVICE void store_as(int first_m, int first_n) {
        if (args.bias != nullptr) add_bias<T>(first_n);
        if constexpr (!std::is_same_v<T, float>) {
            if (args.n % 4 == 0) return store_rows<T>(first_m, first_n);
        }
        store_numbers<T>(first_m, first_n);
    }

    template <class T>
    QL_DEVICE void add_bias(int first_n) {
        QL_UNROLL
        for (int i = 0; i < STRIPS * COUNT; ++i) {
            int n = first_n + n_of(i);
            if (n >= args.n) n = args.n - 1;
            if constexpr (std::is_same_v<T, float>) {
                sums[i] = add_rounded(sums[i], load_global<float>(args.bias + 4 * int64_t(n)));
            } else {
                sums[i] = add_rounded(sums[i], low<T>(load_global<uint16_t>(args.bias + 2 * int64_t(n))));
            }
        }
    }

    // Rows of y begin at multiples of 8 bytes.
    template <class T>
    QL_DEVICE void store_rows(int first_m, int first_n) const {
        if constexpr (Config::W_FIRST) {
            // The warp turns its 8 x 8 matrices over, so that a lane has neighbours of a row of y.
            QL_UNROLL
            for (int i = 0; i < STRIPS * COUNT; i += 4) {
                uint32_t lower = transpose_matrix(pack2<T>(sums[i], sums[i + 1]));
                uint32_t upper = transpose_matrix(pack2<T>(sums[i + 2], sums[i + 3]));
                int m = first_m + i % COUNT / 4 * 8 + (lane >> 2), base = first_n + row_of(i) - (lane >> 2);
                store_words(args.y, args.m, args.n, m, base, lower, upper);
            }
        } else {
            QL_UNROLL
            for (int i = 0; i < STRIPS * COUNT; i += i % 4 == 0 ? 2 : 6) {
                uint32_t lower = pack2<T>(sums[i], sums[i + 1]), upper = pack2<T>(sums[i + 4], sums[i + 5]);
                store_words(args.y, args.m, args.n, first_m + row_of(i), first_n + i % COUNT / 4 * 8, lower, upper);
            }
        }
    }

    template <class T>
    QL_DEVICE void store_numbers(int first_m, int first_n) const {
        QL_UNROLL
        for (int i = 0; i < STRIPS * COUNT; ++i) {
            int m = first_m + m_of(i), n = first_n + n_of(i);
            if (m >= args.m || n >= args.n) continue;
            int64_t place = int64_t(m) * args.n + n;
            if constexpr (std::is_same_v<T, float>) {
                store_global(args.y + 4 * place, sums[i]);
            } else {
                store_global(args.y + 2 * place, uint16_t(pack2<T>(sums[i], 0.0f)));
            }
        }
    }
};

}  // namespace quantlib::cuda

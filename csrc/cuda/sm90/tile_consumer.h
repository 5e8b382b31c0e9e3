// Who decodes and multiplies in linear_tile, and writes y.
#pragma once

#include "store_words.h"
#include "tile_scales.h"
#include "wgmma_zero.h"

namespace quantlib::cuda {

// One of the 256 consumers: a lane of the warp that has strip `warp` of the block.
template <class Config>
struct TileConsumer {
    using Codec = typename Config::Codec;
    using T = typename Config::T;
    static constexpr int BM = Config::BM, PIECE = Config::PIECE, GROUP = Config::GROUP, COUNT = BM / 2;

    const LinearArguments& args;
    const FragmentWeight& w;
    std::byte* shared;
    int lane, warp;
    Codec codec;
    int first_chunk, second_chunk;  // where a lane's words lie in a strip's
    bool exchanged;
    int scale_at[Config::PIECES], zero_at[Config::PIECES];  // entries of the pieces' blocks in a stage, for row r
    int scale_rows, zero_rows;                              // from row r to r + 8
    uint32_t zero_mask;                                     // 0 where there are none
    TileScales<Config::SCALING> piece_scales;               // of the piece in `part`

    float sums[COUNT], part[PIECE > 0 ? COUNT : 1];
    uint32_t a[2][GROUP][4];
    // What a lane has loaded of a turn: words, and of each piece the zeros and entries of scales for rows r and r + 8.
    uint32_t low_words[2 * Codec::LOW], high_words[Codec::HIGH > 0 ? 2 * Codec::HIGH : 1];
    uint32_t zero[Config::PIECES][2], entry[Config::PIECES][2];
    uint32_t own_scale = 0;  // NVFP4

    QL_DEVICE TileConsumer(const LinearArguments& args, std::byte* shared)
        : args(args),
          w(args.weight),
          shared(shared),
          lane(thread() % WARP),
          warp(thread() / WARP),
          codec(w, shared, lane) {
        // In tiles of 128 columns a lane's two chunks of 16 bytes follow each other. Half of the lanes read the second one
        // first: eight lanes then touch all banks once.
        bool wide = w.tile_columns == TURN;
        exchanged = wide && (lane >> 2 & 1) != 0;
        int narrow_step = Codec::LOW == 8 ? 1024 : 512;
        first_chunk = kept_in_register(wide ? 32 * lane + (exchanged ? 16 : 0) : 16 * lane);
        second_chunk = kept_in_register(wide ? 32 * lane + (exchanged ? 0 : 16) : 16 * lane + narrow_step);
        // Nothing of this changes from turn to turn.
        BlockScales<Config::SCALING> scales(w, lane);
        StripWords zeros(w, 1, lane);
        QL_UNROLL
        for (int piece = 0; piece < Config::PIECES; ++piece) {
            int block = PIECE == STEPS ? 0 : piece * PIECE >> scales.log_steps;
            scale_at[piece] = kept_in_register(Config::SCALES_AT + warp * Config::SCALE_BYTES + scales.place(block, 0));
            // Without zeros anything is loaded, and taken for 0.
            int zero = Config::ZEROS_AT + warp * Config::ZERO_BYTES + zeros.place(block);
            zero_at[piece] = kept_in_register(w.zeros != nullptr ? zero : Config::LOW_AT);
        }
        scale_rows = kept_in_register(scales.words.row_bytes);
        zero_rows = kept_in_register(w.zeros != nullptr ? zeros.row_bytes : 0);
        zero_mask = opaque(w.zeros != nullptr ? 0xFF : 0);
    }

    QL_DEVICE static int kept_in_register(int value) { return int(opaque(uint32_t(value))); }

    QL_DEVICE Barrier* full(int slot) const { return reinterpret_cast<Barrier*>(shared + Config::BARRIERS_AT) + slot; }
    QL_DEVICE Barrier* empty(int slot) const { return full(slot) + Config::STAGES; }

    // 32 bytes of a lane: those of the first half of the turn, and the second's.
    QL_DEVICE void read_chunks(uint32_t* first, uint32_t* second, const std::byte* from) const {
        Words4 one = load_shared<Words4>(from + first_chunk), two = load_shared<Words4>(from + second_chunk);
        QL_UNROLL
        for (int i = 0; i < 4; ++i) {
            first[i] = exchanged ? two.w[i] : one.w[i];
            second[i] = exchanged ? one.w[i] : two.w[i];
        }
    }

    // A lane's words of one plane, as common/decode.h wants them.
    template <int BITS>
    QL_DEVICE void read_words(uint32_t (&words)[2 * BITS], const std::byte* from) const {
        if constexpr (BITS == 1) {
            Words2 found = load_shared<Words2>(from + 8 * lane);
            words[0] = found.w[0], words[1] = found.w[1];
        } else if constexpr (BITS == 2) {
            Words4 found = load_shared<Words4>(from + 16 * lane);
            QL_UNROLL
            for (int i = 0; i < 4; ++i) words[i] = found.w[i];
        } else if constexpr (BITS == 4) {
            read_chunks(words, words + 4, from);
        } else {
            // A tile holds the low halves of its steps and then the high ones.
            read_chunks(words, words + 8, from);
            read_chunks(words + 4, words + 12, from + 8 * w.tile_columns);
        }
    }

    QL_DEVICE static constexpr bool begins_piece(int step) { return PIECE > 0 && step % (PIECE > 0 ? PIECE : 1) == 0; }

    // Decodes the group of steps that begins at `step`, into registers that no product reads any more.
    QL_DEVICE void decode(const std::byte* stage, int step) {
        uint32_t(&to)[GROUP][4] = a[step / GROUP % 2];
        if constexpr (Config::SCALING == Scaling::weights) {
            if (step % 4 == 0) own_scale = codec.own_scale(load_shared<Words2>(stage + scale_at[0] + 16 * step));
        }
        if constexpr (Config::ZERO_BYTES > 0) {
            QL_UNROLL
            for (int h = 0; h < 2; ++h) {
                if (begins_piece(step)) codec.set_zero(h, w.offset + zero[step / PIECE][h]);
            }
        }
        QL_UNROLL
        for (int i = 0; i < GROUP; ++i) {
            if constexpr (Config::SCALING == Scaling::weights) {
                codec.operand(to[i], low_words[step + i], shuffle(own_scale, (lane & ~3) + (step + i) % 4));
            } else {
                codec.operand(to[i], low_words, high_words, step + i);
            }
        }
    }

    QL_DEVICE void finish_piece() {
        const float scale[2] = {piece_scales.number(w, 0), piece_scales.number(w, 1)};
        QL_UNROLL
        for (int i = 0; i < COUNT; ++i) sums[i] = multiply_add(part[i], scale[i / 2 % 2], sums[i]);
    }

    QL_DEVICE std::byte* stage(int slot) const { return shared + Codec::TABLE_BYTES + slot * Config::STAGE_BYTES; }

    // Waits until a turn's stage has come, loads the lane's words, zeros and scales, and decodes the first group of steps while
    // the last products of the turn before are under way. It stands at the end of the loop, in a block of its own: ptxas would
    // move it behind the wait for those products otherwise.
    QL_DEVICE void begin_turn(const Ring<Config::STAGES>& ring) {
        barrier_wait(full(ring.slot), ring.parity);
        const std::byte* from = stage(ring.slot);
        read_words<Codec::LOW>(low_words, from + Config::LOW_AT + warp * Config::LOW_BYTES);
        if constexpr (Codec::HIGH > 0) read_words<Codec::HIGH>(high_words, from + Config::HIGH_AT + warp * Config::HIGH_BYTES);
        if constexpr (Config::ZERO_BYTES > 0) {
            QL_UNROLL
            for (int i = 0; i < 2 * Config::PIECES; ++i) {
                zero[i / 2][i % 2] = load_shared<uint8_t>(from + zero_at[i / 2] + i % 2 * zero_rows) & zero_mask;
            }
        }
        if constexpr (Config::SCALE_BYTES > 0 && PIECE > 0) {
            QL_UNROLL
            for (int i = 0; i < 2 * Config::PIECES; ++i) {
                using Entry = typename TileScales<Config::SCALING>::Entry;
                entry[i / 2][i % 2] = load_shared<Entry>(from + scale_at[i / 2] + i % 2 * scale_rows);
            }
        }
        wgmma_wait<1>();
        wgmma_hold(a[0]);
        decode(from, 0);
        wgmma_hold(a[0]);
    }

    // Starts the products of one turn, and waits for those before them. `freed`: the slot of the turn before, or -1.
    QL_DEVICE void multiply_turn(const std::byte* stage, int turn, int freed) {
        const uint64_t x = wgmma_descriptor(stage), x_next = wgmma_descriptor(stage + Config::BOX_BYTES);
        QL_UNROLL
        for (int step = 0; step < STEPS; step += GROUP) {
            uint32_t(&operand)[GROUP][4] = a[step / GROUP % 2];
            if (step > 0) {
                // The group before the last is over: its A registers are free, and at the second group the stage before.
                wgmma_wait<1>();
                wgmma_hold(operand);
                if (step == GROUP && freed >= 0 && lane == 0) barrier_arrive(empty(freed));
                decode(stage, step);
                wgmma_hold(operand);
            }
            const bool begins = begins_piece(step);
            if constexpr (PIECE > 0) {
                if (begins) {
                    wgmma_wait<0>();
                    wgmma_hold(part);
                    finish_piece();
                    piece_scales.load(w, entry[step / PIECE], turn * TURN + 16 * step);
                    wgmma_hold(part);
                }
            }
            wgmma_fence();
            QL_UNROLL
            for (int i = 0; i < GROUP; ++i) {
                int column = 16 * (step + i) % Config::BOX_COLUMNS;
                const uint64_t b = wgmma_advance(step + i < STEPS / 2 ? x : x_next, column);
                if constexpr (PIECE == 0) {
                    wgmma_m64k16<T, BM>(sums, operand[i], b);
                } else {
                    if (begins && i == 0) {
                        wgmma_m64k16_zero<T, BM>(part, operand[i], b);
                    } else {
                        wgmma_m64k16<T, BM>(part, operand[i], b);
                    }
                }
            }
            wgmma_commit();
        }
    }

    // The turns of a share of a block, summed up; `ring` goes on from share to share.
    QL_DEVICE void run(Ring<Config::STAGES>& ring, int strip, int begin, int end) {
        QL_UNROLL
        for (int i = 0; i < COUNT; ++i) sums[i] = 0.0f;
        if constexpr (PIECE > 0) {
            // The first turn finishes a piece that never was.
            QL_UNROLL
            for (int i = 0; i < COUNT; ++i) part[i] = 0.0f;
            piece_scales.begin(w, shared + Config::MAP_AT, strip, lane);
        }
        QL_UNROLL
        for (int i = 0; i < 2 * GROUP * 4; ++i) a[i / (GROUP * 4)][i / 4 % GROUP][i % 4] = 0;
        int freed = -1;
        begin_turn(ring);
        QL_STEADY(true);
        QL_NO_UNROLL
        for (int turn = begin; turn < end; ++turn) {
            multiply_turn(stage(ring.slot), turn, freed);
            freed = ring.slot;
            ring.advance();
            if (turn + 1 < end) begin_turn(ring);
        }
        QL_STEADY(false);
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(empty(freed));
        if constexpr (PIECE > 0) {
            wgmma_hold(part);
            finish_piece();
        } else {
            wgmma_hold(sums);
        }
    }

    // What is left of a row's scale.
    QL_DEVICE float row_scale(int n) const {
        if constexpr (Config::SCALING == Scaling::weights) {
            return multiply_rounded(load_global<float>(w.absmax), Codec::MISSING);
        }
        return BlockScales<Config::SCALING>(w, lane).of_row(n);
    }

    // Sums of the block -> y.
    QL_DEVICE void store(int first_n, int first_m) {
        int base = first_n + STRIP * warp;
        QL_UNROLL
        for (int h = 0; h < 2; ++h) {
            int n = base + (lane >> 2) + 8 * h;
            if (n >= w.n) n = w.n - 1;
            float row = row_scale(n), bias = args.bias == nullptr ? 0.0f : low<T>(load_global<uint16_t>(args.bias + 2 * n));
            QL_UNROLL
            for (int i = 2 * h; i < COUNT; i += 4) {
                sums[i] = add_rounded(multiply_rounded(sums[i], row), bias);
                sums[i + 1] = add_rounded(multiply_rounded(sums[i + 1], row), bias);
            }
        }
        if (args.residual != nullptr) {
            QL_UNROLL
            for (int i = 0; i < COUNT; ++i) {
                int m = first_m + row_of(i), n = base + column_of(i);
                if (m < args.m && n < w.n) sums[i] += low<T>(load_global<uint16_t>(args.residual + place(m, n)));
            }
        }
        if (w.n % 4 == 0) {
            store_rows(base, first_m);
        } else {
            store_numbers(base, first_m);
        }
    }

  private:
    // Sum i of a lane belongs to this row of x, and to this one of W, of the warp's part of the block.
    QL_DEVICE int row_of(int i) const { return i / 4 * 8 + 2 * (lane & 3) + i % 2; }
    QL_DEVICE int column_of(int i) const { return (lane >> 2) + i / 2 % 2 * 8; }
    QL_DEVICE int64_t place(int m, int n) const { return 2 * (int64_t(m) * w.n + n); }

    // Rows of y begin at multiples of 8 bytes: the warp turns its 8 x 8 matrices over, so that a lane has neighbours of a row.
    QL_DEVICE void store_rows(int base, int first_m) const {
        QL_UNROLL
        for (int i = 0; i < COUNT; i += 4) {
            uint32_t lower = transpose_matrix(pack2<T>(sums[i], sums[i + 1]));
            uint32_t upper = transpose_matrix(pack2<T>(sums[i + 2], sums[i + 3]));
            store_words(args.y, args.m, w.n, first_m + i / 4 * 8 + (lane >> 2), base, lower, upper);
        }
    }

    QL_DEVICE void store_numbers(int base, int first_m) const {
        QL_UNROLL
        for (int i = 0; i < COUNT; ++i) {
            int m = first_m + row_of(i), n = base + column_of(i);
            if (m < args.m && n < w.n) store_global(args.y + place(m, n), uint16_t(pack2<T>(sums[i], 0.0f)));
        }
    }
};

}  // namespace quantlib::cuda

// Who brings x and the words of linear_tile into shared memory.
#pragma once

#include "tile_config.h"

namespace quantlib::cuda {

// The way of one warp's share of a stage into shared memory; one thread.
template <class Config>
struct TileProducer {
    using Codec = typename Config::Codec;
    static constexpr int EACH = Config::STRIPS * WARP / Config::PRODUCERS;  // strips of a warp

    const TileArguments& args;
    const FragmentWeight& w;
    int first;  // of its strips
    BlockScales<Config::SCALING> scales;
    StripWords zeros;
    bool has_scales, has_zeros;
    int bytes;  // of a stage

    QL_DEVICE TileProducer(const TileArguments& args, int warp)
        : args(args), w(args.linear.weight), first(warp * EACH), scales(w, 0), zeros(w, 1, 0) {
        has_scales = Config::SCALE_BYTES > 0 && w.scale_home == ScaleHome::strip;
        has_zeros = Config::ZERO_BYTES > 0 && w.zeros != nullptr;
        bytes = EACH * (Config::LOW_BYTES + Config::HIGH_BYTES);
        if (has_scales) bytes += EACH * turn_bytes(scales.words);
        if (has_zeros) bytes += EACH * turn_bytes(zeros);
        if (first == 0) bytes += Config::X_BYTES;
    }

    QL_DEVICE static int turn_bytes(const StripWords& words) { return words.unit_bytes << words.log_turn_units; }

    QL_DEVICE void copy_stage(std::byte* stage, Barrier* full, int first_n, int first_m, int turn) const {
        barrier_expect(full, bytes);
        if (first == 0) {
            QL_UNROLL
            for (int box = 0; box < TURN / Config::BOX_COLUMNS; ++box) {
                copy_tensor(stage + box * Config::BOX_BYTES, args.x, turn * TURN + box * Config::BOX_COLUMNS, first_m, full);
            }
        }
        QL_UNROLL
        for (int i = 0; i < EACH; ++i) {
            int each = first + i, strip = first_n / STRIP + each, last = (w.n - 1) / STRIP;
            if (strip > last) strip = last;
            copy_plane<Codec::LOW>(stage + Config::LOW_AT + each * Config::LOW_BYTES, w.planes[0], strip, turn, full);
            if constexpr (Codec::HIGH > 0) {
                copy_plane<Codec::HIGH>(stage + Config::HIGH_AT + each * Config::HIGH_BYTES, w.planes[1], strip, turn, full);
            }
            std::byte* entries = stage + Config::SCALES_AT + each * Config::SCALE_BYTES;
            if (has_scales) copy_units(entries, w.scales, scales.words, strip, turn, full);
            entries = stage + Config::ZEROS_AT + each * Config::ZERO_BYTES;
            if (has_zeros) copy_units(entries, w.zeros, zeros, strip, turn, full);
        }
    }

  private:
    // Where a strip ends in the middle of the turn, its last piece comes twice: x is zero from there on, and what it is
    // multiplied by need only be numbers.
    template <int BITS>
    QL_DEVICE void copy_plane(std::byte* shared, const std::byte* plane, int strip, int turn, Barrier* full) const {
        int columns = w.tiles * w.tile_columns;
        const std::byte* from = plane + (int64_t(strip) * columns + int64_t(turn) * TURN) * (2 * BITS);
        if (turn * TURN + TURN <= columns) {
            copy_bulk(shared, from, 256 * BITS, full);
        } else {
            copy_bulk(shared, from, 128 * BITS, full);
            copy_bulk(shared + 128 * BITS, from, 128 * BITS, full);
        }
    }

    QL_DEVICE void copy_units(std::byte* shared, const std::byte* part, const StripWords& words, int strip, int turn,
                              Barrier* full) const {
        int unit = (turn << words.log_turn_units) >> words.log_unit_turns, size = words.unit_bytes;
        const std::byte* from = part + (int64_t(strip) * words.units + unit) * size;
        if (unit + (1 << words.log_turn_units) <= words.units) {
            copy_bulk(shared, from, turn_bytes(words), full);
        } else {
            copy_bulk(shared, from, size, full);
            copy_bulk(shared + size, from, size, full);
        }
    }
};

}  // namespace quantlib::cuda

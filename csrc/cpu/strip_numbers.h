// Scales, zeros and minima of a strip of rows: a vector is one group of columns of sixteen rows.
#pragma once

#include "strip_lanes.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

// The fp32 scales, zeros and minima of groups of columns of one strip: from their bytes where each row has its own, or else from numbers
// that were expanded row by row.
class StripNumbers {
  public:
    // `bytes`: of each row that are read at a time, 16 to 64. Codes of scales of scales are taken 64 at a time all the same.
    explicit StripNumbers(const Plan& plan, int64_t bytes = MOST_GROUPS)
        : plan_(plan), parts_(plan), direct_(reads(plan)), group_(group_of(plan)), groups_(groups_of(plan, bytes)),
          expanded_(plan, columns(plan), STRIP) {}
    // Columns that are multiplied: of stored ones behind column k no more than row by row.
    static int64_t columns(const Plan& plan) { return least(plan.padded_k, round_up(plan.k, 128)); }

    const Plan& plan() const { return plan_; }
    int64_t group() const { return group_; }    // columns
    int64_t groups() const { return groups_; }  // at a time, of a strip: a power of two, at least eight
    int64_t groups_across() const { return (columns(plan_) + group_ - 1) / group_; }
    // What a run of groups that are read may begin at a multiple of: whole words of every row, whole second-level scales.
    int64_t whole_groups() const { return plan_.scale == ScaleKind::super && direct_ ? 32 : few_groups(); }
    // So few that a processor reads them while it still waits for what was asked for before.
    int64_t few_groups() const { return plan_.scale == ScaleKind::super && direct_ ? groups_ : most(1, groups_ / 4); }
    int64_t floats() const { return 2 * size() + (direct_ ? 0 : round_up(expanded_.floats(), LANES)); }

    // Of one strip, in memory of that size.
    class Memory {
      public:
        Memory(const StripNumbers& all, float* memory)
            : all_(all), memory_(memory), rows_(all.expanded_.in(memory + 2 * all.size())) {}
        const float* scales() const { return memory_; }
        const float* shifts() const { return memory_ + all_.size(); }  // zeros or minima

        // Begin with rows row ... row + rows.
        void begin(const Parts& parts, int64_t row, int64_t rows) {
            parts_ = &parts, row_ = row, count_ = rows;
            if (!all_.direct_) rows_.expand(parts, row, rows);  // such parts lie as in `rows`
        }
        // Fill in groups first ... first + count, of which there may be fewer. `codes`: lines to ask for meanwhile.
        // `whole`: up to a multiple of it with groups that change no total, whether 0 or -0, where sums are 0.
        void fill(int64_t first, int64_t count, int whole, const uint8_t* codes) {
            fill(first, count, codes);
            for (int64_t g = count; g % whole != 0; ++g) {
                store(memory_ + g * STRIP, broadcast(-0.0f));
                store(memory_ + all_.size() + g * STRIP, zero());
            }
        }
        void fill(int64_t first, int64_t count, const uint8_t* codes) {
            const Plan& plan = all_.plan_;
            meanwhile_ = {codes};
            read(first, count, memory_, [&](int64_t at, int64_t numbers, float* to) { read_scales(at, numbers, to); },
                 [&](int r) { return rows_.of(r).scale; });
            float* shifts = memory_ + all_.size();
            if (plan.has_zero) {
                read(first, count, shifts, [&](int64_t at, int64_t numbers, float* to) { read_zeros(at, numbers, to); },
                     [&](int r) { return rows_.of(r).zero; });
            } else if (plan.has_minimum) {
                read(first, count, shifts, [&](int64_t at, int64_t numbers, float* to) { read_minima(at, numbers, to); },
                     [&](int r) { return rows_.of(r).minimum; });
            }
        }

      private:
        const StripNumbers& all_;
        float* const memory_;
        BlockNumbers rows_;
        const Parts* parts_ = nullptr;
        int64_t row_ = 0, count_ = 0;
        Meanwhile meanwhile_ = {};

        template <class Read, class Row>
        inline void read(int64_t first, int64_t count, float* to, Read read_blocks, Row row) const {
            const Plan& plan = all_.plan_;
            if (!all_.direct_) {
                StripRows rows;
                for (int r = 0; r < STRIP; ++r) rows.row[r] = reinterpret_cast<const uint8_t*>(row(int(least(r, count_ - 1))));
                return read_number_lanes<DType::float32>(rows, first, count, meanwhile_, to);
            }
            if (plan.block_cols == all_.group_) return read_blocks(first, count, to);
            // A block of any width holds groups of 128 columns.
            const int64_t width = plan.block_cols == 0 ? plan.padded_k : plan.block_cols;
            const int64_t block = first * all_.group_ / width;
            const int64_t last = least(plan.blocks_across - 1, ((first + count) * all_.group_ - 1) / width);
            alignas(64) float blocks[(MOST_GROUPS + 4) * STRIP];
            read_blocks(block, last - block + 1, blocks);
            for (int64_t g = 0; g < count; ++g) {
                store(to + g * STRIP, load(blocks + ((first + g) * all_.group_ / width - block) * STRIP));
            }
        }

        // The rows' numbers of one kind, of which those from byte `at` on are read; the next strip's are asked for.
        StripRows rows_of(const uint8_t* Parts::*which, int64_t at, int64_t bytes) const {
            const NumberPart& part = all_.parts_.of(which);
            const uint8_t* first = parts_->*which + row_ * part.row_bytes;
            if (part.moved) {  // as many columns ahead as codes of four bits
                const int64_t columns = STRIP_AHEAD * 2 / STRIP, strip_bytes = part.row_bytes * STRIP;
                return StripRows::of_words(first, count_, strip_bytes * columns / all_.plan_.padded_k);
            }
            // Its rows lie one behind the other: a share of them for each share of this strip's.
            const uint8_t* next = first + STRIP * (part.row_bytes + at);
            for (int64_t byte = 0; byte < STRIP * bytes; byte += 64) fetch(next + byte);
            return StripRows::of(first, part.row_bytes, count_);
        }
        inline void read_floats(const uint8_t* Parts::*part, int64_t first, int64_t count, float* to) const {
            const DType dtype = all_.plan_.scale_dtype;
            const StripRows rows = rows_of(part, first * item_size(dtype), count * item_size(dtype));
            with_dtype(dtype, [&](auto typed) { read_number_lanes<decltype(typed)::dtype>(rows, first, count, meanwhile_, to); });
        }
        inline void read_scales(int64_t first, int64_t count, float* to) const {
            const Plan& plan = all_.plan_;
            switch (plan.scale) {
                case ScaleKind::number: return read_floats(&Parts::scales, first, count, to);
                case ScaleKind::super: return read_supers(&Parts::scales, &Parts::super_scales, first, count, to);
                default: break;
            }
            const StripRows rows = rows_of(&Parts::scales, first, count);
            if (plan.scale == ScaleKind::e4m3_global) return read_e4m3_lanes(rows, first, count, *parts_->global_scale, meanwhile_, to);
            read_byte_lanes(rows, first, count, meanwhile_, to, [](Ints bytes) QUANTLIB_LAMBDA { return power_of(bytes); });
        }
        inline void read_zeros(int64_t first, int64_t count, float* to) const {
            const StripRows rows = rows_of(&Parts::zeros, first, count);
            read_byte_lanes(rows, first, count, meanwhile_, to, [](Ints bytes) QUANTLIB_LAMBDA { return number(bytes); });
        }
        inline void read_minima(int64_t first, int64_t count, float* to) const {
            if (all_.plan_.scale != ScaleKind::super) return read_floats(&Parts::minima, first, count, to);
            read_supers(&Parts::minima, &Parts::super_minima, first, count, to);
        }
        inline void read_supers(const uint8_t* Parts::*codes, const uint8_t* Parts::*units, int64_t first, int64_t count, float* to) const {
            const Plan& plan = all_.plan_;
            count = round_up(count, plan.super_count);  // a row has whole runs of them
            const int64_t supers = count / plan.super_count;
            const StripRows rows = rows_of(codes, first * plan.super_bits / 8, count * plan.super_bits / 8);
            const StripRows unit_rows = rows_of(units, first / plan.super_count * 2, supers * 2);
            const auto read = [&](auto function) {
                function(rows, unit_rows, plan.blocks_across, plan.super_offset, first, count, meanwhile_, to);
            };
            const bool eight = plan.super_count == 8;
            switch (plan.super_bits) {
                case 4: return read(eight ? read_super_lanes<4, 8> : read_super_lanes<4, 16>);
                case 6: return read(eight ? read_super_lanes<6, 8> : read_super_lanes<6, 16>);
                default: return read(eight ? read_super_lanes<8, 8> : read_super_lanes<8, 16>);
            }
        }
    };

  private:
    const Plan& plan_;
    const NumberParts parts_;
    const bool direct_;
    const int64_t group_, groups_;
    const BlockNumbers expanded_;

    static constexpr int64_t MOST_GROUPS = 64;  // at a time, with room for three more
    int64_t size() const { return (MOST_GROUPS + 4) * STRIP; }

    static int64_t group_of(const Plan& plan) {
        return reads(plan) && plan.block_cols > 0 && plan.block_cols <= WIDEST_BLOCK ? plan.block_cols : plan.span_piece;
    }
    static int64_t groups_of(const Plan& plan, int64_t bytes) {
        if (!reads(plan)) return LANES;
        if (plan.scale == ScaleKind::super) return MOST_GROUPS;
        return plan.scale == ScaleKind::number ? most(8, bytes / item_size(plan.scale_dtype)) : bytes;
    }
    // Whether numbers are read from their bytes.
    static bool reads(const Plan& plan) {
        if (plan.block_rows != 1 || plan.scale == ScaleKind::double_quant) return false;
        if ((plan.block_cols == 0 || plan.block_cols > WIDEST_BLOCK) && plan.span_piece != 128) return false;
        if (plan.scale != ScaleKind::super) return true;
        const bool known = plan.super_bits == 4 || plan.super_bits == 6 || plan.super_bits == 8;
        const bool whole = (plan.super_count == 8 || plan.super_count == 16) && plan.blocks_across % plan.super_count == 0;
        return known && whole && plan.block_cols > 0 && plan.block_cols <= WIDEST_BLOCK;
    }
};

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

// The codes of sixteen rows as a strip has them (strips.h), with room for sixteen where there are fewer.
#pragma once

#include "strips.h"

#ifdef QUANTLIB_HAS_TRANSPOSE
namespace quantlib::cpu::QUANTLIB_ISA {

// The codes of a strip; of a last one of fewer rows, a copy with room for sixteen.
class WholeStrip {
  public:
    static int64_t floats(const Plan& plan) { return plan.n % STRIP == 0 ? 0 : round_up(row_bytes_of(plan) * STRIP / 4, LANES); }

    WholeStrip(const LinearCall& call, float* memory) : call_(call), memory_(reinterpret_cast<uint8_t*>(memory)) {}
    Planes planes(int64_t row) const {
        const Plan& plan = *call_.plan;
        const int64_t row_bytes = row_bytes_of(plan), rows = plan.n - row, row_words = row_bytes / WORD_BYTES;
        const uint8_t* strip = call_.parts.codes + row * row_bytes;
        for (int64_t word = 0; rows < STRIP && word < row_words; ++word) {
            uint8_t* to = memory_ + word * STRIP * WORD_BYTES;
            memset(to, 0, STRIP * WORD_BYTES);
            memcpy(to, strip + word * rows * WORD_BYTES, rows * WORD_BYTES);
        }
        return planes_of(plan.bits, rows < STRIP ? memory_ : strip, plan.padded_k * STRIP);
    }

  private:
    const LinearCall& call_;
    uint8_t* const memory_;
};

// Words first ... last of `count` rows, `row_bytes` apart -> [word][STRIP], of rows that are missing zeros.
inline void lay_strip(const uint8_t* rows, int64_t row_bytes, int64_t count, int64_t first, int64_t last, uint8_t* to) {
    static_assert(LANES == STRIP);
    for (int64_t word = first; word < last; word += LANES) {
        const int64_t words = least(LANES, last - word);
        const __mmask16 there = __mmask16((1 << words) - 1);
        Ints square[LANES];
        for (int r = 0; r < STRIP; ++r) {
            const uint8_t* from = rows + least(r, count - 1) * row_bytes + word * WORD_BYTES;
            fetch_once(from + row_bytes * STRIP);  // the next strip's
            square[r] = r < count ? _mm512_maskz_loadu_epi32(there, from) : _mm512_setzero_si512();
        }
        transpose(square);
        for (int64_t i = 0; i < words; ++i) store_ints(to + (word - first + i) * (STRIP * WORD_BYTES), square[i]);
    }
}

// Those of some columns of a strip, whatever layout a weight lies in: each plane of a row must be whole words of 32 bits.
class StripCodes {
  public:
    // Floats of memory for so many columns, a multiple of 32, at once.
    static int64_t floats(const Plan& plan, int64_t columns) {
        return plan.strips ? WholeStrip::floats(plan) : columns * plan.bits / 8 * STRIP / 4;
    }
    StripCodes(const LinearCall& call, float* memory) : call_(call), whole_(call, memory), memory_(reinterpret_cast<uint8_t*>(memory)) {}

    // Of the rows from `row` on; columns first ... last of them can be read, the first a multiple of 32.
    Planes planes(int64_t row, int64_t first, int64_t last) const {
        const Plan& plan = *call_.plan;
        if (plan.strips) return whole_.planes(row);
        const int64_t row_bytes = row_bytes_of(plan), end = least(last, plan.padded_k);
        const uint8_t* rows = call_.parts.codes + row * row_bytes;
        Planes planes = {};
        uint8_t* to = memory_;
        int64_t word = 0;  // a plane's first
        for (int i = 0; i < 3; ++i) {
            const int width = PLANE_WIDTHS[plan.bits][i];
            if (width == 0) break;
            const int64_t start = first * width / 32, stop = (end * width + 31) / 32;
            lay_strip(rows, row_bytes, least(STRIP, plan.n - row), word + start, word + stop, to);
            planes.plane[i] = to - start * (STRIP * WORD_BYTES);
            to += (stop - start) * (STRIP * WORD_BYTES);
            word += plan.padded_k * width / 32;
        }
        return planes;
    }

  private:
    const LinearCall& call_;
    const WholeStrip whole_;
    uint8_t* const memory_;
};

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

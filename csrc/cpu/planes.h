// Codes of 1 to 8 bits as planes of 2^i bits that stand one after the other in a row (quantlib/formats/packing.py).
#pragma once

#include "simd.h"

namespace quantlib::cpu::QUANTLIB_ISA {

// The planes of one row's codes, from some column on.
struct Planes {
    const uint8_t* plane[3];
};

// The widths of the planes of a code of 0..8 bits, low bits first; 0 where there are fewer.
constexpr int PLANE_WIDTHS[9][3] = {{0, 0, 0}, {1, 0, 0}, {2, 0, 0}, {2, 1, 0}, {4, 0, 0},
                                    {4, 1, 0}, {4, 2, 0}, {4, 2, 1}, {8, 0, 0}};

// The planes of a row of `columns` codes that starts at `row`.
inline Planes planes_of(int bits, const uint8_t* row, int64_t columns) {
    Planes planes;
    for (int i = 0; i < 3; ++i) {
        planes.plane[i] = row;
        row += columns * PLANE_WIDTHS[bits][i] / 8;
    }
    return planes;
}

// The same planes, `chunk` chunks further on.
inline Planes moved(int bits, Planes planes, int64_t chunk) {
    for (int i = 0; i < 3; ++i) planes.plane[i] += chunk * (CHUNK * PLANE_WIDTHS[bits][i] / 8);
    return planes;
}

// The codes of `rows` rows of `columns` codes each, a multiple of eight, as one row: `to` gets its planes one after the other.
inline void join_rows(int bits, const uint8_t* from, int64_t columns, int64_t rows, uint8_t* to) {
    const int64_t row_bytes = columns * bits / 8;
    const Planes first = planes_of(bits, from, columns);
    for (int i = 0; i < 3; ++i) {
        const int width = PLANE_WIDTHS[bits][i];  // bytes of eight codes
        for (int64_t r = 0; r < rows && width != 0; ++r, to += columns * width / 8) {
            memcpy(to, first.plane[i] + r * row_bytes, columns * width / 8);
        }
    }
}

// A copy of the last `columns` < CHUNK codes of a row: a whole chunk can be read from it, the rest of it zero.
struct TailChunk {
    uint8_t bytes[3][CHUNK] = {};
    TailChunk(int bits, const Planes& from, int64_t columns) {
        for (int i = 0; i < 3; ++i) memcpy(bytes[i], from.plane[i], columns * PLANE_WIDTHS[bits][i] / 8);
    }
    inline Planes planes() const { return {{bytes[0], bytes[1], bytes[2]}}; }
};

// One weight row, read in spans of SPAN columns: its codes, and a padded copy of the last span where the stored codes end inside it.
template <int SPAN>
class SpanRow {
  public:
    SpanRow(const Plan& plan, const Parts& parts, int64_t row)
        : whole_(plan.padded_k / SPAN),
          planes_(planes_of(plan.bits, parts.codes + row * (plan.padded_k * plan.bits / 8), plan.padded_k)) {
        for (int i = 0; i < 3 && whole_ * SPAN < plan.k; ++i) {
            const int width = PLANE_WIDTHS[plan.bits][i];
            memset(tail_[i], 0, SPAN);
            memcpy(tail_[i], planes_.plane[i] + whole_ * (SPAN * width / 8), (plan.padded_k - whole_ * SPAN) * width / 8);
        }
    }
    int64_t whole() const { return whole_; }
    const Planes& planes() const { return planes_; }
    Planes tail() const { return {{tail_[0], tail_[1], tail_[2]}}; }

  private:
    const int64_t whole_;  // spans that lie inside the stored codes
    const Planes planes_;
    uint8_t tail_[3][SPAN];
};

// Codes in the low BITS of each lane, with their neighbours' bits above.
template <int BITS>
inline void unpack_codes(const Planes& planes, int64_t chunk, Ints* codes) {
    constexpr int FIRST = PLANE_WIDTHS[BITS][0], SECOND = PLANE_WIDTHS[BITS][1], THIRD = PLANE_WIDTHS[BITS][2];
    unpack<FIRST>(planes.plane[0] + chunk * (CHUNK * FIRST / 8), codes);
    if constexpr (SECOND != 0) {
        Ints high[VECTORS];
        unpack<SECOND>(planes.plane[1] + chunk * (CHUNK * SECOND / 8), high);
        for (int v = 0; v < VECTORS; ++v) codes[v] = join<FIRST>(codes[v], high[v]);
    }
    if constexpr (THIRD != 0) {
        Ints high[VECTORS];
        unpack<THIRD>(planes.plane[2] + chunk * (CHUNK * THIRD / 8), high);
        for (int v = 0; v < VECTORS; ++v) codes[v] = join<FIRST + SECOND>(codes[v], high[v]);
    }
}

// Codes -> their numbers in fp32, for rows of packed integers that are no weights: `to` has room for whole chunks.
template <int BITS>
inline void read_codes(const uint8_t* row, int64_t count, float* to) {
    const Planes planes = planes_of(BITS, row, count);
    const int64_t whole = count / CHUNK;
    Ints codes[VECTORS];
    for (int64_t chunk = 0; chunk < whole; ++chunk) {
        unpack_codes<BITS>(planes, chunk, codes);
        for (int v = 0; v < VECTORS; ++v) store(to + chunk * CHUNK + v * LANES, number(clean<BITS>(codes[v])));
    }
    if (whole * CHUNK < count) {
        const TailChunk tail(BITS, moved(BITS, planes, whole), count - whole * CHUNK);
        unpack_codes<BITS>(tail.planes(), 0, codes);
        for (int v = 0; v < VECTORS; ++v) store(to + whole * CHUNK + v * LANES, number(clean<BITS>(codes[v])));
    }
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

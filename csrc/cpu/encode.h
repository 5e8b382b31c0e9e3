// Weights -> packed codes in one pass: a row is read as fp32 into the first-level cache, CHUNK columns at a time are divided by
// their scales and rounded to codes in registers, and the codes are packed as bytes.
//
// Format.encode_blocks (quantlib/formats/base.py) is the law, bit by bit: x = (w + minimum) / scale, or times 1 / scale where
// the format says so; x = 0 where the scale is 0; then x + zero.
#pragma once

#include "quantize_types.h"
#include "rounding.h"
#include "rows.h"

namespace quantlib::cpu::QUANTLIB_ISA {

// CHUNK codes, one a byte -> one plane of them, from bit `shift` on.
template <int WIDTH>
inline void pack_plane(const uint8_t* codes, int shift, uint8_t* to) {
    constexpr uint64_t LOW = 0x0101010101010101u * ((1u << WIDTH) - 1);
    for (int i = 0; i < CHUNK / 8; ++i) {
        uint64_t word;
        memcpy(&word, codes + 8 * i, 8);
        word = (word >> shift) & LOW;
        // Eight codes move together in three steps: pairs, fours, all.
        if constexpr (WIDTH == 4) {
            word = (word | word >> 4) & 0x00FF00FF00FF00FFu;
            word = (word | word >> 8) & 0x0000FFFF0000FFFFu;
            word |= word >> 16;
        } else if constexpr (WIDTH == 2) {
            word = (word | word >> 6) & 0x000F000F000F000Fu;
            word = (word | word >> 12) & 0x000000FF000000FFu;
            word |= word >> 24;
        } else if constexpr (WIDTH == 1) {
            word = (word | word >> 7) & 0x0003000300030003u;
            word = (word | word >> 14) & 0x0000000F0000000Fu;
            word |= word >> 28;
        }
        memcpy(to + i * WIDTH, &word, WIDTH);
    }
}

// Where the planes of a row of codes begin.
struct PackedRow {
    uint8_t* plane[3];
    int bits;

    PackedRow(int bits_, uint8_t* row, int64_t columns) : bits(bits_) {
        for (int i = 0; i < 3; ++i) {
            plane[i] = row;
            row += columns * PLANE_WIDTHS[bits][i] / 8;
        }
    }

    inline void put(int64_t chunk, const uint8_t* codes) const {
        int shift = 0;
        for (int i = 0; i < 3; ++i) {
            const int width = PLANE_WIDTHS[bits][i];
            uint8_t* to = plane[i] + chunk * (CHUNK * width / 8);
            switch (width) {
                case 8: pack_plane<8>(codes, shift, to); break;
                case 4: pack_plane<4>(codes, shift, to); break;
                case 2: pack_plane<2>(codes, shift, to); break;
                case 1: pack_plane<1>(codes, shift, to); break;
            }
            shift += width;
        }
    }

    // The first `columns` codes of a chunk: the row ends inside it.
    inline void put_some(int64_t chunk, const uint8_t* codes, int64_t columns) const {
        uint8_t packed[3 * CHUNK];
        PackedRow whole(bits, packed, CHUNK);
        whole.put(0, codes);
        for (int i = 0; i < 3; ++i) {
            const int width = PLANE_WIDTHS[bits][i];
            memcpy(plane[i] + chunk * (CHUNK * width / 8), whole.plane[i], columns * width / 8);
        }
    }
};

// A row's numbers, one per piece. What a format lacks is -0.0: x + -0.0 is x, whatever its sign.
struct PieceNumbers {
    float *factor, *zero, *minimum;  // factor: the scale, or its reciprocal
};

template <class Rounding, int PIECE, bool SHIFTED, bool RECIPROCAL>
bool encode_row(const Coding& coding, const float* weights, const PieceNumbers& numbers, const PackedRow& out) {
    constexpr int PIECES = CHUNK / PIECE;
    const Rounding rounding(coding);
    Floats finite = zero();  // sums of w * 0: NaN where any w is no finite number
    for (int64_t chunk = 0; chunk * CHUNK < coding.padded_k; ++chunk) {
        uint8_t codes[CHUNK];
        for (int v = 0; v < VECTORS; ++v) {
            Floats x = load(weights + chunk * CHUNK + v * LANES);
            finite = multiply_add(x, zero(), finite);
            if constexpr (SHIFTED) x = add(x, spread<PIECE>(numbers.minimum + chunk * PIECES, v));
            const Floats factor = spread<PIECE>(numbers.factor + chunk * PIECES, v);
            x = RECIPROCAL ? multiply(x, factor) : divide(x, factor);
            if constexpr (SHIFTED) x = add(x, spread<PIECE>(numbers.zero + chunk * PIECES, v));
            store_bytes(codes + v * LANES, rounding.code(x));
        }
        const int64_t columns = coding.padded_k - chunk * CHUNK;
        if (columns >= CHUNK) {
            out.put(chunk, codes);
        } else {
            out.put_some(chunk, codes, columns);
        }
    }
    return sum(finite) == 0.0f;
}

typedef bool (*EncodeRow)(const Coding&, const float*, const PieceNumbers&, const PackedRow&);

template <class Rounding, int PIECE>
inline EncodeRow pick_encode(const Coding& coding) {
    if (coding.has_zero || coding.has_minimum) {
        return coding.reciprocal ? encode_row<Rounding, PIECE, true, true> : encode_row<Rounding, PIECE, true, false>;
    }
    return coding.reciprocal ? encode_row<Rounding, PIECE, false, true> : encode_row<Rounding, PIECE, false, false>;
}

template <class Rounding>
inline EncodeRow pick_encode(const Coding& coding) {
    if (coding.piece == 32) return pick_encode<Rounding, 32>(coding);
    return coding.piece == 16 ? pick_encode<Rounding, 16>(coding) : pick_encode<Rounding, 8>(coding);
}

inline EncodeRow pick_encode(const Coding& coding) {
    switch (coding.rounding) {
        case RoundingKind::affine: return pick_encode<AffineRounding>(coding);
        case RoundingKind::table: return pick_encode<TableRounding>(coding);
        default: return pick_encode<MinifloatRounding>(coding);
    }
}

// One thread's memory: a row of weights and its numbers.
class EncodeScratch {
  public:
    static int64_t columns(const Coding& coding) { return round_up(coding.padded_k, CHUNK); }
    static int64_t pieces(const Coding& coding) { return columns(coding) / coding.piece + CHUNK; }
    static int64_t floats(const Coding& coding) { return round_up(columns(coding) + 3 * pieces(coding), CHUNK); }

    EncodeScratch(const EncodeCall& call, float* memory) : call_(call), coding_(*call.coding), weights_(memory) {
        const int64_t room = pieces(coding_);
        float* numbers = memory + columns(coding_);
        numbers_ = {numbers, numbers + room, numbers + 2 * room};
        for (int64_t i = 0; i < columns(coding_); ++i) weights_[i] = 0.0f;
        for (int64_t i = 0; i < room; ++i) numbers_.factor[i] = 1.0f, numbers_.zero[i] = numbers_.minimum[i] = -0.0f;
    }

    // False where a weight or a number of the row is not finite.
    inline bool encode(EncodeRow loop, int64_t row) {
        const int64_t block_row = coding_.block_rows == 0 ? 0 : row / coding_.block_rows;
        if (block_row != block_row_) finite_numbers_ = expand(block_row);
        block_row_ = block_row;
        const uint8_t* data = static_cast<const uint8_t*>(call_.weight.data);
        read_numbers(call_.weight.dtype, data + row * call_.weight.row_stride * item_size(call_.weight.dtype), coding_.k,
                     weights_);
        if (has_empty_) return encode_beside_empty(loop, row, block_row);
        return loop(coding_, weights_, numbers_, packed(row)) && finite_numbers_;
    }

  private:
    const EncodeCall& call_;
    const Coding& coding_;
    float* weights_;
    PieceNumbers numbers_;
    int64_t block_row_ = -1;
    bool has_empty_ = false, finite_numbers_ = true;

    inline int64_t width() const { return coding_.block_cols == 0 ? coding_.padded_k : coding_.block_cols; }

    inline PackedRow packed(int64_t row) const {
        return PackedRow(coding_.bits, call_.codes + row * (coding_.padded_k * coding_.bits / 8), coding_.padded_k);
    }

    // A block whose scale is 0 encodes 0: its weights are taken for +0. Weights that are not finite are looked for before.
    inline bool encode_beside_empty(EncodeRow loop, int64_t row, int64_t block_row) {
        const float* scale = call_.numbers.scale + block_row * coding_.blocks_across;
        float nothing = 0.0f;
        for (int64_t g = 0; g < coding_.blocks_across; ++g) {
            if (scale[g] != 0.0f) continue;
            for (int64_t i = g * width(), stop = least(i + width(), coding_.k); i < stop; ++i) {
                nothing += weights_[i] * 0.0f;
                weights_[i] = 0.0f;
            }
        }
        return loop(coding_, weights_, numbers_, packed(row)) && finite_numbers_ && nothing == 0.0f;
    }

    // Fill the numbers of a row of blocks; false where one is not finite.
    inline bool expand(int64_t block_row) {
        const int64_t across = coding_.blocks_across, first = block_row * across;
        const int64_t end = columns(coding_) / coding_.piece, repeats = coding_.block_cols == 0 ? end : width() / coding_.piece;
        float nothing = 0.0f;
        has_empty_ = false;
        for (int64_t g = 0; g < across; ++g) {
            const float scale = call_.numbers.scale[first + g];
            const float zero = coding_.has_zero ? call_.numbers.zero[first + g] : -0.0f;
            const float minimum = coding_.has_minimum ? call_.numbers.minimum[first + g] : -0.0f;
            const bool empty = scale == 0.0f;
            has_empty_ = has_empty_ || empty;
            nothing += scale * 0.0f + zero * 0.0f + minimum * 0.0f;
            for (int64_t p = g * repeats, stop = least(p + repeats, end); p < stop; ++p) {
                numbers_.factor[p] = empty ? 1.0f : coding_.reciprocal ? reciprocal(scale) : scale;
                numbers_.zero[p] = zero;
                numbers_.minimum[p] = empty ? -0.0f : minimum;
            }
        }
        return nothing == 0.0f;
    }

    static inline float reciprocal(float scale) { return 1.0f / (scale > 1e-38f ? scale : 1e-38f); }
};

inline Outcome encode(const EncodeCall& call) {
    const Coding& coding = *call.coding;
    const int64_t rows = call.weight.rows, floats = EncodeScratch::floats(coding);
    const int threads = useful_threads(rows * coding.padded_k, call.threads);
    const Scratch scratch(threads * floats);
    if (scratch.floats == nullptr) return Outcome::no_memory;
    const EncodeRow loop = pick_encode(coding);
    bool finite = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : finite)
    for (int part = 0; part < threads; ++part) {
        EncodeScratch own(call, scratch.floats + part * floats);
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads; ++i) finite = own.encode(loop, i) && finite;
    }
    return finite ? Outcome::done : Outcome::not_finite;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

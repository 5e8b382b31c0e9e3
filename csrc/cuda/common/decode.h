// Codes in registers -> the A operand of mma m16n8k16, step by step (16 columns): registers of pairs p = 2 g + h, which stand for
// row r + 8 h and columns 8 g + 2 q, + 1 of lane 4 r + q.
//
// A codec says how many bits its planes have, and makes `operand(a, words, step, ...)`: exact numbers in 16 bits, whose scales are
// applied to sums (Integer, Table, Small), or weights already multiplied by their block's scale (ScaledFloat4).
#pragma once

#include "fragments.h"

namespace quantlib::cuda {

// Numbers as pairs of T.
template <class T>
struct Constants;
template <>
struct Constants<Bf16> {
    static constexpr uint32_t one = 0x3F803F80;
    static constexpr uint32_t magic = 0x43004300;    // 128: the unit in the last place is 1, seven bits of a code fit below
    static constexpr uint32_t negative = 0xC300;     // -128 in one half, for codes to be or-ed in
    static constexpr int mantissa = 7, bias = 127;
};
template <>
struct Constants<Half> {
    static constexpr uint32_t one = 0x3C003C00;
    static constexpr uint32_t magic = 0x64006400;  // 1024
    static constexpr uint32_t negative = 0xE400;
    static constexpr int mantissa = 10, bias = 15;
};

QL_DEVICE constexpr uint32_t both(uint32_t half) { return half | half << 16; }

// A mask that the compiler can't fold: a LOP3 has room for one constant, and a second one would be moved into a register at every
// use instead of once.
QL_DEVICE uint32_t kept(uint32_t constant) { return opaque(constant); }

constexpr int AND_OR = 0xEA;  // lop3: (a & b) | c

// A power of two 2^exponent as a pair.
template <class T>
QL_DEVICE constexpr uint32_t power(int exponent) {
    return both(uint32_t(exponent + Constants<T>::bias) << Constants<T>::mantissa);
}

// Integers of 2, 3, 4 or 8 bits: code - offset - zero, exactly.
template <class T, int BITS>
struct Integer {
    static constexpr int LOW = BITS == 3 ? 2 : BITS, HIGH = BITS == 3 ? 1 : 0;  // bits of the planes
    static constexpr bool HAS_ZERO = BITS < 8;
    static constexpr int TABLE_BYTES = 0;
    using C = Constants<T>;

    uint32_t mask, mask_high, shift[2];  // shift: -(magic + offset + zero) for rows r and r + 8

    QL_DEVICE Integer(const FragmentWeight& w, const std::byte*, int) {
        if constexpr (BITS == 8) {
            mask = kept(0x007F007F), mask_high = kept(0x00800080);
        } else {
            mask = kept(both((1 << LOW) - 1)), mask_high = kept(both(1 << LOW));
        }
        set_zero(0, w.offset), set_zero(1, w.offset);
    }

    // offset_and_zero < 128.
    QL_DEVICE void set_zero(int h, uint32_t offset_and_zero) { shift[h] = both(C::negative | offset_and_zero); }

    QL_DEVICE void operand(uint32_t (&a)[4], const uint32_t* low, const uint32_t* high, int step) const {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            if constexpr (BITS == 8) {
                a[p] = eight(low[8 * (step / 4) + 4 * (p / 2) + step % 4], p % 2);
                continue;
            }
            uint32_t word, at;
            if constexpr (LOW == 4) {
                word = low[step], at = 4 * p;
            } else {
                word = low[step / 2], at = 2 * p + 8 * (step % 2);
            }
            uint32_t code = lop3<AND_OR>(word >> at, mask, C::magic);
            if constexpr (HIGH > 0) {
                int bit = p + 4 * (step % 4) - LOW;
                uint32_t moved = bit >= 0 ? high[step / 4] >> (bit < 0 ? 0 : bit) : high[step / 4] << (bit < 0 ? -bit : 0);
                code = lop3<AND_OR>(moved, mask_high, code);
            }
            a[p] = fma2<T>(code, C::one, shift[p % 2]);
        }
    }

  private:
    // code - 128 of the byte h in both halves. fp16 holds 1024 + code. bf16 holds 128 + (code & 127), and takes off 256 or 128 by
    // the code's high bit.
    QL_DEVICE uint32_t eight(uint32_t word, int h) const {
        if constexpr (C::mantissa == 10) {
            return fma2<T>(prmt(word, 0x64646464, h == 0 ? 0x4240 : 0x4341), C::one, both(C::negative | 128));
        } else {
            uint32_t moved = word >> (8 * h);
            uint32_t code = lop3<AND_OR>(moved, mask, C::magic);
            // 0xC300 | inverted high bit: (~moved & mask_high) | -128.
            uint32_t taken = lop3<0xAE>(moved, mask_high, both(C::negative));
            return fma2<T>(code, C::one, taken);
        }
    }
};

// A code book of 16 (NF4, FP4): a table of pairs in shared memory, indexed by a byte that holds two codes. Each lane has a copy of
// its own in its own bank. Entries are rounded to T.
template <class T>
struct Table {
    static constexpr int LOW = 4, HIGH = 0;
    static constexpr bool HAS_ZERO = false;
    static constexpr int TABLE_BYTES = 256 * 32 * 4;

    const std::byte* table;
    uint32_t mask, own;  // own: where the lane's copy of an entry begins

    QL_DEVICE Table(const FragmentWeight&, const std::byte* table, int lane) : table(table), mask(kept(0x7F80)), own(4 * lane) {}

    QL_DEVICE static void fill(std::byte* table, const FragmentWeight& w, int thread, int threads) {
        for (int e = thread; e < 256; e += threads) {
            uint32_t pair = pack2<T>(load_global<float>(w.table + (e & 15)), load_global<float>(w.table + (e >> 4)));
            Words4 copies = {{pair, pair, pair, pair}};
            // Neighbours begin at different chunks, for the banks' sake.
            for (int c = 0; c < 8; ++c) store_shared(table + 128 * e + 16 * ((c + e) & 7), copies);
        }
    }

    QL_DEVICE void operand(uint32_t (&a)[4], const uint32_t* low, const uint32_t*, int step) const {
        uint32_t word = low[step];
        uint32_t low01 = entry(word << 7), low23 = entry(word >> 1), high01 = entry(word >> 9), high23 = entry(word >> 17);
        a[0] = prmt(low01, high01, 0x5410), a[1] = prmt(low01, high01, 0x7632);
        a[2] = prmt(low23, high23, 0x5410), a[3] = prmt(low23, high23, 0x7632);
    }

  private:
    QL_DEVICE uint32_t entry(uint32_t moved) const { return load_shared<uint32_t>(table + lop3<AND_OR>(moved, mask, own)); }
};

// E2M1 as the layout spreads it -> sign (15) and magnitude where T's lowest exponent bits and highest mantissa bit are, in both
// halves: the number * 2^-126 (bf16), * 2^-14 (fp16).
template <class T>
struct Float4Bits {
    static constexpr int TARGET = Constants<T>::mantissa - 1;  // of the magnitude's lowest bit
    uint32_t magnitude, sign, together;

    QL_DEVICE Float4Bits() {
        constexpr uint32_t MAGNITUDE = both(7u << TARGET), SIGN = 0x80008000;
        magnitude = kept(MAGNITUDE), sign = kept(SIGN), together = kept(MAGNITUDE | SIGN);
    }

    QL_DEVICE uint32_t bits(uint32_t word, int p) const {
        constexpr int SIGN_AT[4] = {13, 12, 14, 15};  // the magnitude of pair p begins at 3 p
        int up = TARGET - 3 * p, sign_up = 15 - SIGN_AT[p];
        uint32_t moved = up >= 0 ? word << (up < 0 ? 0 : up) : word >> (up < 0 ? -up : 0);
        if (up == sign_up) return moved & together;
        return lop3<AND_OR>(moved, magnitude, (word << sign_up) & sign);
    }
};

// E2M1 (MXFP4): the numbers themselves.
template <class T>
struct Float4 {
    static constexpr int LOW = 4, HIGH = 0;
    static constexpr bool HAS_ZERO = false;
    static constexpr int TABLE_BYTES = 0;
    Float4Bits<T> moved;

    QL_DEVICE Float4(const FragmentWeight&, const std::byte*, int) {}

    QL_DEVICE void operand(uint32_t (&a)[4], const uint32_t* low, const uint32_t*, int step) const {
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = mul2<T>(moved.bits(low[step], p), power<T>(Constants<T>::bias - 1));
    }
};

// E2M1 times an E4M3 scale per 16 columns (NVFP4): exact, six significant bits; without the tensor's multiplier and 2^8, for
// which the sums make up (MISSING).
template <class T>
struct ScaledFloat4 {
    static constexpr int LOW = 4, HIGH = 0;
    static constexpr bool HAS_ZERO = false;
    static constexpr int TABLE_BYTES = 0;
    static constexpr float MISSING = 256.0f;
    Float4Bits<T> moved;
    uint32_t selector;

    // Each lane of a row converts the scale of one of the four steps, for rows r and r + 8.
    QL_DEVICE ScaledFloat4(const FragmentWeight&, const std::byte*, int lane) {
        // The byte q of either word; E4M3's sign, which is 0, fills the bytes above.
        uint32_t q = lane & 3;
        // What a shuffle brings is kept in a register; what is calculated, ptxas may calculate anew in every turn.
        selector = shuffle_quad(q | (8 | q) << 4 | (4 | q) << 8 | (12 | q) << 12, q);
    }

    // words: the scales of a tile's four steps, of row r and of row r + 8. -> scale * 2^118 (bf16), * 2^6 (fp16), pairs (r, r + 8).
    QL_DEVICE uint32_t own_scale(Words2 words) const {
        uint32_t codes = prmt(words.w[0], words.w[1], selector);
        if constexpr (Constants<T>::mantissa == 10) {
            return mul2<T>(codes << 7, power<T>(14));
        } else {
            return mul2<T>(mul2<T>(codes << 4, power<T>(120)), power<T>(118));
        }
    }

    QL_DEVICE void operand(uint32_t (&a)[4], uint32_t word, uint32_t scales) const {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            a[p] = mul2<T>(moved.bits(word, p), p % 2 == 0 ? low_twice(scales) : high_twice(scales));
        }
    }
};

// 8-bit floats with 4 or 5 exponent bits.
template <class T, int EXPONENT>
struct Float8 {
    static constexpr int LOW = 8, HIGH = 0;
    static constexpr bool HAS_ZERO = false;
    static constexpr int TABLE_BYTES = 0;
    using C = Constants<T>;
    uint32_t sign, magnitude;

    QL_DEVICE Float8(const FragmentWeight&, const std::byte*, int) { sign = kept(0x80008000), magnitude = kept(MAGNITUDE); }

    QL_DEVICE void operand(uint32_t (&a)[4], const uint32_t* low, const uint32_t*, int step) const {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            uint32_t word = low[8 * (step / 4) + 4 * (p / 2) + step % 4];
            uint32_t up = p % 2 == 0 ? word << 8 : word;  // the byte in the upper half of each half
            if constexpr (EXPONENT == 5 && C::mantissa == 10) {
                a[p] = up & kept(0xFF00FF00);
            } else {
                // 7 bits of magnitude below the sign move down under T's exponent.
                uint32_t bits = lop3<AND_OR>(up >> DOWN, magnitude, up & sign);
                a[p] = mul2<T>(bits, power<T>(C::bias - (1 << (EXPONENT - 1)) + 1));
            }
        }
    }

  private:
    static constexpr int DOWN = 15 - EXPONENT - C::mantissa;
    static constexpr uint32_t MAGNITUDE = both(0x7F00u >> DOWN);
};

}  // namespace quantlib::cuda

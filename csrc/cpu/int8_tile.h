// y[M, N] = x[M, K] W^T + bias for x in int8 with a scale per row, and for weights whose values are whole multiples of a unit: four
// products of bytes at a time, added as integers over a piece of columns that share a scale, then in fp32.
//
// Lanes are rows of x. Sixteen of them lie side by side, four columns of each together, so that four bytes of a row of W meet all
// sixteen in one instruction, and a scale of W is one number for all lanes. The instruction takes x without a sign: x + 128 is
// multiplied, and sums of integers start at -128 times the sum of the piece's weights.
//
// Pieces are added in ascending order, so that a row of y depends neither on threads nor on the other rows of x.
#pragma once

#include "pairs_round.h"
#include "simd_int8.h"

#ifdef QUANTLIB_HAS_INT8
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int INT8_ROWS = 6, INT8_XS = 2;  // of W, and vectors of x: 12 sums in integers, 12 in fp32, and what they are made of
constexpr int INT8_BLOCK_ROWS = 48;        // decoded together
// Of these at most so many columns, for memory gives long runs faster; and multiplied at once: two vectors of x take 20 KB of the
// first-level cache.
constexpr int64_t INT8_DECODED = 2560, INT8_MULTIPLIED = 640;
constexpr int64_t INT8_STRIDE = INT8_DECODED + 64, INT8_PIECES = INT8_DECODED / 8 + LANES;

// Columns of some rows of W and of two vectors of x.
struct Int8Operands {
    const int8_t* weights;       // [rows][INT8_STRIDE]
    const int32_t* corrections;  // [rows][INT8_PIECES]
    const float* scale;          // [rows][numbers_stride], one per piece
    const float* shift;          // zeros or minima
    int64_t numbers_stride;
    float per_unit;  // 1 / unit
    const uint8_t* x;     // [vectors][columns / 4][LANES][4]
    const float* x_sums;  // [vectors][pieces][LANES]
    int64_t x_stride, sums_stride;
    int64_t pieces, piece;
};

// to[r][v] += the product of row r of W with vector v of x, but for the scales of x. PIECE: 0 where it is none of the short ones.
template <int PIECE, int XS, Shift SHIFT>
void multiply_int8(const Int8Operands& o, float* to, int64_t to_stride) {
    constexpr int ROWS = INT8_ROWS;
    Floats total[ROWS][XS];
#pragma GCC unroll 8  // here and below: else vectors go through memory
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < XS; ++v) total[r][v] = load(to + r * to_stride + v * LANES);
    }
    const int8_t* weights = o.weights;
    const uint8_t* x = o.x;
    for (int64_t p = 0; p < o.pieces; ++p) {
        Ints sum[ROWS][XS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            for (int v = 0; v < XS; ++v) sum[r][v] = broadcast_int(o.corrections[r * INT8_PIECES + p]);
        }
        const auto add_four = [&]() QUANTLIB_LAMBDA {
            Ints a[XS];
            for (int v = 0; v < XS; ++v) a[v] = load_ints(x + v * o.x_stride);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const Ints w = same_four(weights + r * INT8_STRIDE);
                for (int v = 0; v < XS; ++v) sum[r][v] = dot_bytes(sum[r][v], a[v], w);
            }
            x += 4 * LANES, weights += 4;
        };
        if constexpr (PIECE > 0) {
#pragma GCC unroll 8
            for (int four = 0; four < PIECE; four += 4) add_four();
        } else {
#pragma GCC unroll 4
            for (int64_t four = 0; four < o.piece; four += 4) add_four();
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Floats scale = broadcast(o.scale[r * o.numbers_stride + p]);
            for (int v = 0; v < XS; ++v) total[r][v] = multiply_add(number(sum[r][v]), scale, total[r][v]);
            if constexpr (SHIFT != Shift::none) {
                const int64_t at = r * o.numbers_stride + p;
                const Floats shift = broadcast(-o.shift[at] * (SHIFT == Shift::zero ? o.scale[at] : 1.0f) * o.per_unit);
                for (int v = 0; v < XS; ++v) {
                    total[r][v] = multiply_add(shift, load(o.x_sums + v * o.sums_stride + p * LANES), total[r][v]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < XS; ++v) store(to + r * to_stride + v * LANES, total[r][v]);
    }
}

using Int8Function = void (*)(const Int8Operands&, float*, int64_t);
template <int XS, Shift SHIFT>
inline Int8Function int8_function(int64_t piece) {
    switch (piece) {
        case 8: return multiply_int8<8, XS, SHIFT>;
        case 16: return multiply_int8<16, XS, SHIFT>;
        case 32: return multiply_int8<32, XS, SHIFT>;
        default: return multiply_int8<0, XS, SHIFT>;
    }
}
template <int XS>
inline Int8Function int8_function(const Plan& plan) {
    switch (shift_of(plan)) {
        case Shift::none: return int8_function<XS, Shift::none>(plan.span_piece);
        case Shift::zero: return int8_function<XS, Shift::zero>(plan.span_piece);
        default: return int8_function<XS, Shift::minimum>(plan.span_piece);
    }
}

// x in the order of multiply_int8.
class Int8X {
  public:
    Int8X(const Int8Call& call, int64_t columns, int64_t piece, uint8_t* bytes, float* sums)
        : call_(call), columns_(columns), piece_(piece), bytes_(bytes), sums_(sums) {}

    static int64_t vectors(int64_t m) { return (m + LANES - 1) / LANES; }
    // Bytes and sums of one vector; vectors a multiple of 4096 bytes apart would compete for the same sets of a cache.
    static int64_t stride(int64_t columns) { return columns * LANES + 64; }
    static int64_t sums_stride(int64_t columns, int64_t piece) { return columns / piece * LANES; }

    void arrange(int64_t vector) const {
        const int64_t m = call_.linear.m, k = call_.linear.plan->k, first = vector * LANES;
        const uint8_t* codes = static_cast<const uint8_t*>(call_.linear.x);
        uint8_t* to = bytes_ + vector * stride(columns_);
        for (int64_t column = 0; column < columns_; column += 64) {
            Ints rows[LANES];
            const int64_t count = most(0, least(64, k - column));
            for (int i = 0; i < LANES; ++i) {
                uint8_t run[64];
                const uint8_t* from = codes + least(first + i, m - 1) * k + column;
                if (count == 64) {
                    rows[i] = load_ints(from);
                } else {
                    memset(run, 128, 64);
                    memcpy(run, from, count);
                    rows[i] = load_ints(run);
                }
            }
            transpose(rows);
            for (int i = 0; i < LANES; ++i, to += 64) store_ints(to, rows[i]);
        }
        if (sums_ != nullptr) add_pieces(vector);
    }
    Int8Operands at(int64_t vector, int64_t column) const {
        Int8Operands operands = {};
        operands.x = bytes_ + vector * stride(columns_) + column * LANES;
        operands.x_stride = stride(columns_);
        operands.sums_stride = sums_stride(columns_, piece_);
        operands.x_sums = sums_ == nullptr ? nullptr : sums_ + vector * operands.sums_stride + column / piece_ * LANES;
        operands.piece = piece_;
        return operands;
    }

  private:
    const Int8Call& call_;
    const int64_t columns_, piece_;
    uint8_t* const bytes_;
    float* const sums_;

    inline void add_pieces(int64_t vector) const {
        const uint8_t* from = bytes_ + vector * stride(columns_);
        float* to = sums_ + vector * sums_stride(columns_, piece_);
        for (int64_t column = 0; column < columns_; column += piece_, to += LANES) {
            Ints sum = broadcast_int(int32_t(-128 * piece_));
            for (int64_t four = 0; four < piece_; four += 4, from += 64) sum = dot_bytes(sum, load_ints(from), same_bytes(1));
            store(to, number(sum));
        }
    }
};

// What one thread works in.
struct Int8Memory {
    int8_t* weights;
    int32_t* corrections;
    float* sums;  // [INT8_BLOCK_ROWS][m rounded up to whole vectors]
    float* out;   // [LANES][INT8_BLOCK_ROWS]
    BlockNumbers numbers;
    PartRows rows;  // INT8_BLOCK_ROWS of them
    int8_t table[64];  // codes of up to six bits -> multiples of the unit

    static int64_t floats(const LinearCall& call, const BlockNumbers& numbers) {
        return INT8_BLOCK_ROWS * (INT8_STRIDE / 4 + INT8_PIECES + Int8X::vectors(call.m) * LANES + LANES) +
               round_up(numbers.floats(), LANES) + PartRows::floats(*call.plan, INT8_BLOCK_ROWS);
    }
    Int8Memory(const Int8Call& call, const BlockNumbers& placeless, float* memory)
        : numbers(placeless),
          rows(*call.linear.plan, memory + floats(call.linear, placeless) - PartRows::floats(*call.linear.plan, INT8_BLOCK_ROWS),
               INT8_BLOCK_ROWS) {
        memset(memory, 0, floats(call.linear, placeless) * sizeof(float));
        weights = reinterpret_cast<int8_t*>(memory), memory += INT8_BLOCK_ROWS * INT8_STRIDE / 4;
        corrections = reinterpret_cast<int32_t*>(memory), memory += INT8_BLOCK_ROWS * INT8_PIECES;
        sums = memory, memory += INT8_BLOCK_ROWS * Int8X::vectors(call.linear.m) * LANES;
        out = memory, memory += INT8_BLOCK_ROWS * LANES;
        numbers = placeless.in(memory);
        for (int i = 0; i < 64; ++i) {
            const float value = call.linear.plan->values[i] / call.unit;
            table[i] = value == value ? int8_t(value) : int8_t(0);  // a code that means none
        }
    }
};

struct Int8Tile {
    const Int8Call& call;
    const Int8X& x;
    const int64_t columns, piece;

    // What is decoded some rows later, counted from a row's columns: rows further on of the block, or the first of the next block.
    struct Ahead {
        int64_t rows, columns;
    };
    inline Ahead ahead(int64_t r, int64_t rows, int64_t start, int64_t stop) const {
        if (r + ROWS_AHEAD < rows) return {ROWS_AHEAD, 0};
        if (stop < columns) return {ROWS_AHEAD - rows, stop - start};
        return {ROWS_AHEAD, -start};
    }

    // Columns start ... stop of a row, which is the r-th of its block, and the sums that its pieces start with.
    template <int BITS>
    void decode_row(const Parts& parts, int64_t row, int64_t r, int64_t start, int64_t stop, const Ahead& next,
                    const Int8Memory& memory) const {
        const Plan& plan = *call.linear.plan;
        const Planes planes = planes_of(BITS, parts.codes + row * (plan.padded_k * BITS / 8), plan.padded_k);
        const Ints table = load_ints(memory.table), offset = same_bytes(int(plan.offset));
        const int64_t last = least(stop, plan.padded_k), row_bytes = plan.padded_k * BITS / 8;
        int8_t* const weights = memory.weights + r * INT8_STRIDE;
        for (int64_t column = start; column < stop; column += 64) {
            for (int i = 0; i < 3; ++i) {
                const int width = PLANE_WIDTHS[BITS][i];
                if (width != 0) fetch(planes.plane[i] + (column + next.columns) / 8 * width + next.rows * row_bytes);
            }
            Ints codes;
            if (column + 64 <= last) {
                codes = code_bytes<BITS>(planes, column / 64);
            } else {  // from a copy: no byte behind the row is read
                uint8_t bytes[3][64] = {};
                for (int i = 0; i < 3 && column < last; ++i) {
                    const int width = PLANE_WIDTHS[BITS][i];
                    memcpy(bytes[i], planes.plane[i] + column / 8 * width, (last - column) * width / 8);
                }
                codes = code_bytes<BITS>({{bytes[0], bytes[1], bytes[2]}}, 0);
            }
            store_ints(weights + (column - start), BITS <= 6 ? look_up_bytes(codes, table) : subtract_bytes(codes, offset));
        }
        int32_t* corrections = memory.corrections + r * INT8_PIECES;
        Ints sum = broadcast_int(0);
        for (int64_t column = 0; column < stop - start; column += 64) {
            sum = dot_bytes(sum, same_bytes(1), load_ints(weights + column));
            if (piece == SPAN_COLUMNS && column % SPAN_COLUMNS == 0) continue;
            store_ints(corrections, subtract(broadcast_int(0), shift_left<7>(sum_runs(sum, least(piece, 64) / 4))));
            corrections += most(1, 64 / piece);
            sum = broadcast_int(0);
        }
    }

    // Rows row ... row + rows.
    inline void decode_block(int64_t row, int64_t rows, int64_t start, int64_t stop, const Int8Memory& memory) const {
        const Parts parts = memory.rows.codes(call.linear.parts, row, rows, start, stop);
        const auto all = [&](auto decode) {
            for (int64_t r = 0; r < rows; ++r) (this->*decode)(parts, row + r, r, start, stop, ahead(r, rows, start, stop), memory);
        };
        switch (call.linear.plan->bits) {
            case 1: return all(&Int8Tile::decode_row<1>);
            case 2: return all(&Int8Tile::decode_row<2>);
            case 3: return all(&Int8Tile::decode_row<3>);
            case 4: return all(&Int8Tile::decode_row<4>);
            case 5: return all(&Int8Tile::decode_row<5>);
            case 6: return all(&Int8Tile::decode_row<6>);
            case 7: return all(&Int8Tile::decode_row<7>);
            default: return all(&Int8Tile::decode_row<8>);
        }
    }

    // Columns start ... stop of those that were decoded from `from` on.
    inline void multiply_block(int64_t rows, int64_t from, int64_t start, int64_t stop, const Int8Memory& memory) const {
        const Int8Function pair = int8_function<INT8_XS>(*call.linear.plan), single = int8_function<1>(*call.linear.plan);
        const int64_t vectors = Int8X::vectors(call.linear.m), stride = vectors * LANES;
        const RowNumbers first = memory.numbers.of(0, start / piece);
        for (int64_t vector = 0; vector < vectors; vector += INT8_XS) {
            for (int64_t r = 0; r < rows; r += INT8_ROWS) {  // behind the last row stands what nobody reads
                Int8Operands operands = x.at(vector, start);
                operands.weights = memory.weights + r * INT8_STRIDE + (start - from);
                operands.corrections = memory.corrections + r * INT8_PIECES + (start - from) / piece;
                operands.numbers_stride = memory.numbers.next(first).scale - first.scale;
                operands.scale = first.scale + r * operands.numbers_stride;
                operands.shift = (call.linear.plan->has_zero ? first.zero : first.minimum) + r * operands.numbers_stride;
                operands.per_unit = 1.0f / call.unit;
                // Behind column k stand numbers of another row.
                operands.pieces = (least(stop, call.linear.plan->k) - start + piece - 1) / piece;
                const Int8Function function = vector + INT8_XS <= vectors ? pair : single;
                function(operands, memory.sums + r * stride + vector * LANES, stride);
            }
        }
    }

    // Sums, times the scales of x, and the bias -> y.
    inline void write(int64_t row, int64_t rows, const Int8Memory& memory) const {
        const int64_t m = call.linear.m, stride = Int8X::vectors(m) * LANES;
        for (int64_t first = 0; first < m; first += LANES) {
            float scales[LANES] = {};
            for (int64_t i = 0; i < least(LANES, m - first); ++i) scales[i] = call.x_scales[first + i] * call.unit;
            for (int64_t r = 0; r < rows; r += LANES) {
                Ints sums[LANES];
                for (int i = 0; i < LANES; ++i) {
                    sums[i] = as_ints(multiply(load(memory.sums + (r + i) * stride + first), load(scales)));
                }
                transpose(sums);
                for (int i = 0; i < LANES; ++i) store(memory.out + i * INT8_BLOCK_ROWS + r, as_floats(sums[i]));
            }
            write_products(call.linear, first, least(m, first + LANES), row, rows, memory.out, INT8_BLOCK_ROWS);
        }
    }

    // `count` columns in parts of about one width, at most `most_columns`.
    static int64_t even_part(int64_t count, int64_t most_columns) {
        const int64_t parts = most(1, (count + most_columns - 1) / most_columns);
        return most(SPAN_COLUMNS, round_up((count + parts - 1) / parts, SPAN_COLUMNS));
    }

    void rows(int64_t from, int64_t to, const Int8Memory& memory) const {
        static_assert(INT8_BLOCK_ROWS % LANES == 0 && INT8_BLOCK_ROWS % INT8_ROWS == 0);
        const int64_t decoded = even_part(columns, INT8_DECODED), multiplied = even_part(decoded, INT8_MULTIPLIED);
        for (int64_t row = from; row < to; row += INT8_BLOCK_ROWS) {
            const int64_t count = least(INT8_BLOCK_ROWS, to - row);
            memory.numbers.expand(memory.rows.numbers(call.linear.parts, row, count), row, count);
            memset(memory.sums, 0, INT8_BLOCK_ROWS * Int8X::vectors(call.linear.m) * LANES * sizeof(float));
            for (int64_t start = 0; start < columns; start += decoded) {
                const int64_t stop = least(columns, start + decoded);
                decode_block(row, count, start, stop, memory);
                for (int64_t column = start; column < stop; column += multiplied) {
                    multiply_block(count, start, column, least(stop, column + multiplied), memory);
                }
            }
            write(row, count, memory);
        }
    }

    static constexpr int64_t SPAN_COLUMNS = 128;  // a whole number of pieces
    static_assert(INT8_DECODED % SPAN_COLUMNS == 0 && INT8_MULTIPLIED % SPAN_COLUMNS == 0);
};

inline bool int8_tile(const Int8Call& call) {
    const LinearCall& linear = call.linear;
    const Plan& plan = *linear.plan;
    if (linear.m == 0 || plan.n == 0) return true;
    const int64_t columns = round_up(plan.k, Int8Tile::SPAN_COLUMNS), piece = plan.span_piece, vectors = Int8X::vectors(linear.m);
    const int threads = useful_threads(plan.n * columns * linear.m, linear.threads);
    const BlockNumbers numbers(plan, least(plan.padded_k, columns), INT8_BLOCK_ROWS);
    const int64_t thread_floats = round_up(Int8Memory::floats(linear, numbers), LANES);
    const Scratch bytes(vectors * Int8X::stride(columns) / 4), scratch(threads * thread_floats);
    const bool shifted = shift_of(plan) != Shift::none;
    const Scratch sums(shifted ? vectors * Int8X::sums_stride(columns, piece) : 0);
    if (bytes.floats == nullptr || sums.floats == nullptr || scratch.floats == nullptr) return false;

    const Int8X x(call, columns, piece, reinterpret_cast<uint8_t*>(bytes.floats), shifted ? sums.floats : nullptr);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t vector = 0; vector < vectors; ++vector) x.arrange(vector);

    const Int8Tile work{call, x, columns, piece};
    const int64_t share = share_of(plan, INT8_ROWS);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        const Int8Memory memory(call, numbers, scratch.floats + part * thread_floats);
        work.rows(share_start(plan.n, share, part, threads), share_start(plan.n, share, part + 1, threads), memory);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

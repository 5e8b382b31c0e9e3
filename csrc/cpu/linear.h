// y[M, N] = x[M, K] W^T + bias for few rows of x: weights are decoded in fp32 and never rounded, products and sums are fp32.
//
// Threads split the rows of W. Within a row the order of additions is fixed: vectors of x*w go to two chains by turns, the
// chains are added, then the lanes. It depends neither on the number of threads nor on M, so a row of y has the same bits in
// any batch.
//
//     M = 1   a row of W goes from its packed bytes into the two chains without leaving the registers
//     M > 1   ROWS rows x BLOCK columns are decoded into the first-level cache, then multiplied with two rows of x at a time:
//             x comes from the second-level cache, and each load of it serves ROWS rows
#pragma once

#include "strips.h"

namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int ROWS = LANES == 16 ? 4 : 2;  // chains of a tile: ROWS * 2 rows of x * 2, half of the registers
constexpr int BLOCK = 1024;                // columns
static_assert(BLOCK % CHUNK == 0 && VECTORS % 2 == 0);

// chains[r * chains_stride + m * 2 + parity] += weights[r] * x[m], over `columns` columns (whole chunks).
template <int R, int M>
void tile(const float* weights, const float* x, int64_t x_stride, int64_t columns, float* chains, int64_t chains_stride) {
    Floats chain[R][M][2];
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < 2 * M; ++i) chain[r][i / 2][i % 2] = load(chains + (r * chains_stride + i) * LANES);
    }
    for (int64_t column = 0; column < columns; column += 2 * LANES) {
        for (int parity = 0; parity < 2; ++parity) {
            const int64_t at = column + parity * LANES;
            Floats w[R];
            for (int r = 0; r < R; ++r) w[r] = load(weights + r * BLOCK + at);
            for (int m = 0; m < M; ++m) {
                const Floats a = load(x + m * x_stride + at);
                for (int r = 0; r < R; ++r) chain[r][m][parity] = multiply_add(w[r], a, chain[r][m][parity]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < 2 * M; ++i) store(chains + (r * chains_stride + i) * LANES, chain[r][i / 2][i % 2]);
    }
}

template <int R>
void multiply_block(const float* weights, const float* x, int64_t x_stride, int64_t m, int64_t columns, float* chains) {
    int64_t i = 0;
    for (; i + 2 <= m; i += 2) {
        tile<R, 2>(weights, x + i * x_stride, x_stride, columns, chains + i * 2 * LANES, 2 * m);
    }
    if (i < m) tile<R, 1>(weights, x + i * x_stride, x_stride, columns, chains + i * 2 * LANES, 2 * m);
}

inline float total(Floats even, Floats odd) { return sum(add(even, odd)); }

struct LinearWork {
    const LinearCall& call;
    const float* x;   // fp32 [m, columns], rows x_stride apart
    int64_t columns;  // k rounded up to whole chunks; x is zero beyond k
    int64_t x_stride;
    DecodeLoop<DotSink> dot_loop;
    DecodeLoop<StoreSink> store_loop;

    inline void write(int64_t row, int64_t count, int64_t m, float* sums) const {
        if (call.bias != nullptr) {
            for (int64_t r = 0; r < count; ++r) sums[r] += call.bias[row + r];
        }
        uint8_t* y = static_cast<uint8_t*>(call.y);
        write_numbers(call.dtype, sums, count, y + (m * call.plan->n + row) * item_size(call.dtype));
    }

    // M = 1
    inline void one_row(int64_t row, const RowNumbers& numbers, PartRows& whole) const {
        const Parts& parts = whole.of(call.parts, row);
        expand_row(*call.plan, parts, row, numbers, call.plan->piece);
        const Row weights(*call.plan, parts, row, numbers);
        DotSink sink{x, {zero(), zero()}};
        weights.decode(dot_loop, 0, columns / CHUNK, sink);
        float value = total(sink.chain[0], sink.chain[1]);
        write(row, 1, 0, &value);
    }

    // R rows of W with every row of x. `decoded`: R * BLOCK floats; `chains`: R * m * 2 vectors.
    template <int R>
    inline void several_rows(int64_t row, const RowNumbers* numbers, PartRows& whole, float* decoded, float* chains) const {
        const Plan& plan = *call.plan;
        memset(chains, 0, R * call.m * 2 * LANES * sizeof(float));
        for (int r = 0; r < R; ++r) expand_row(plan, whole.of(call.parts, row + r), row + r, numbers[r], plan.piece);
        for (int64_t start = 0; start < columns; start += BLOCK) {
            const int64_t stop = least(start + BLOCK, columns);
            for (int r = 0; r < R; ++r) {
                StoreSink sink{decoded + r * BLOCK};
                const Row weights(plan, whole.of(call.parts, row + r), row + r, numbers[r]);
                weights.decode(store_loop, start / CHUNK, stop / CHUNK, sink);
            }
            multiply_block<R>(decoded, x + start, x_stride, call.m, stop - start, chains);
        }
        for (int64_t m = 0; m < call.m; ++m) {
            float sums[R];
            for (int r = 0; r < R; ++r) {
                const float* at = chains + (r * call.m + m) * 2 * LANES;
                sums[r] = total(load(at), load(at + LANES));
            }
            write(row, R, m, sums);
        }
    }
};

inline bool linear(const Joined<LinearCall>& joined) {
    const LinearCall& first = joined.calls[0];
    const Plan& plan = *first.plan;
    const int64_t columns = round_up(plan.k, CHUNK), rows = rows_of(joined), m_count = first.m;
    if (m_count == 0 || rows == 0) return true;
    const int threads = useful_threads(rows * columns * m_count, first.threads);
    const int64_t numbers_floats = round_up(numbers_size(plan), LANES);
    const int64_t chain_floats = ROWS * m_count * 2 * LANES;
    const int64_t work_floats = ROWS * (numbers_floats + BLOCK) + chain_floats;
    const int64_t thread_floats = work_floats + PartRows::floats(plan);
    // Rows a multiple of 4096 bytes apart would all compete for the same few sets of the first-level cache.
    const int64_t x_stride = columns + CHUNK;
    const Scratch x(m_count * x_stride), scratch(threads * thread_floats);
    if (x.floats == nullptr || scratch.floats == nullptr) return false;

    for (int64_t m = 0; m < m_count; ++m) {
        const uint8_t* from = static_cast<const uint8_t*>(first.x) + m * first.x_row_stride * item_size(first.dtype);
        float* to = x.floats + m * x_stride;
        read_strided(first.dtype, from, first.x_column_stride, plan.k, to);
        memset(to + plan.k, 0, (columns - plan.k) * sizeof(float));
    }

    const DecodeLoop<DotSink> dot_loop = pick_loop<DotSink>(plan);
    const DecodeLoop<StoreSink> store_loop = pick_loop<StoreSink>(plan);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        float* memory = scratch.floats + part * thread_floats;
        RowNumbers numbers[ROWS];
        for (int r = 0; r < ROWS; ++r) numbers[r] = carve_numbers(plan, memory + r * numbers_floats);
        float* decoded = memory + ROWS * numbers_floats;
        const auto rows_of_thread = [&](const LinearCall& call, int64_t start, int64_t stop) {
            const LinearWork work{call, x.floats, columns, x_stride, dot_loop, store_loop};
            PartRows whole(*call.plan, memory + work_floats);
            int64_t row = start;
            for (; m_count > 1 && row + ROWS <= stop; row += ROWS) {
                work.template several_rows<ROWS>(row, numbers, whole, decoded, decoded + ROWS * BLOCK);
            }
            for (; row < stop; ++row) {
                if (m_count == 1) {
                    work.one_row(row, numbers[0], whole);
                } else {
                    work.template several_rows<1>(row, numbers, whole, decoded, decoded + ROWS * BLOCK);
                }
            }
        };
        for_rows(joined, part, threads, rows_of_thread, share_of(plan, 1));
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

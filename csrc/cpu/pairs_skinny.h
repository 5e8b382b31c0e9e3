// y[M, N] = x[M, K] W^T + bias in bf16 for few rows of x: weights, rounded as in pairs_round.h, go span by span from their codes into
// the first-level cache while those of the span before are multiplied: four rows of W by four of x, or three by eight. Sums stay in
// registers from the first column to the last.
//
// Weights don't stay in registers in between: beside the sums there is no room for them and for what decodes, and what decodes stands
// first in each turn, for a processor takes the oldest instruction that is ready.
//
// A row of y depends neither on the number of threads nor on the other rows of x.
#pragma once

#include "pairs_round.h"
#include "pairs_x.h"
#include "rows.h"

#include <type_traits>

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int FEW_XS = 4, MORE_XS = 8;  // rows of x at once
constexpr int MOST_SKINNY_ROWS = 4;     // of W

// x in the order of decoded words, parted or not; rows of zeros behind the last.
struct SkinnyX {
    const uint16_t* words;
    int64_t stride, spans;
    SkinnyX from_row(int64_t m) const { return {words + m * stride, stride, spans}; }
};

template <class Decoder, int ROWS, int XS>
class SkinnyProduct {
  public:
    SkinnyProduct(const Decoder& decoder, const LinearCall& call, const int64_t (&which)[ROWS], const RowNumbers (&numbers)[ROWS],
                  const SkinnyX& x)
        : decoder_(decoder), numbers_(numbers), x_(x), part_(PairsRow(*call.plan, call.parts, which[0]).part()) {
        for (int r = 0; r < ROWS; ++r) {
            const PairsRow row(*call.plan, call.parts, which[r]);
            inside_ = least(row.whole(), x.spans);
            whole_[r] = row.planes(), tail_[r] = row.tail();
        }
    }

    // values[m][r][0] = the product of row r of W with row m of x, for `count` rows that x has. Inlined, it would spill its sums.
    __attribute__((noinline)) void multiply(int64_t count, float* values) const {
        alignas(64) uint16_t weights[2][ROWS * SPAN];
        Totals total;
#pragma GCC unroll 24  // else sums go through memory, here and below
        for (int i = 0; i < XS * ROWS; ++i) total[i / ROWS][i % ROWS] = zero();
        if (inside_ > 0) decode(0, weights[0]);
        const uint16_t* words = x_.words;
        int64_t span = 0;
        for (; span < inside_ - 1; ++span) {
            decode(span + 1, weights[(span + 1) % 2]);
            add(weights[span % 2], words, x_.stride, total);
            words += SPAN;
        }
        for (; span < x_.spans; ++span) {
            if (span >= inside_) decode_tail(weights[span % 2]);
            add(weights[span % 2], words, x_.stride, total);
            words += SPAN;
        }
#pragma GCC unroll 2
        for (int m = 0; m < XS; m += 4) {
            if (m >= count) break;
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                float sums[4];
                _mm_storeu_ps(sums, four_sums(total[m][r], total[m + 1][r], total[m + 2][r], total[m + 3][r]));
                for (int i = 0; i < 4 && m + i < count; ++i) values[((m + i) * ROWS + r) * WRITE_ROWS] = sums[i];
            }
        }
    }

  private:
    using Totals = Floats[XS][ROWS];
    const Decoder& decoder_;
    const RowNumbers (&numbers_)[ROWS];
    const SkinnyX& x_;
    const PartSpan part_;
    int64_t inside_;  // spans that are stored whole
    Planes whole_[ROWS], tail_[ROWS];

    // The weights of a span of one row; vectors of the rows lie side by side.
    template <class Stored>
    QUANTLIB_INLINE void decode_row(const Stored& stored, const Planes& planes, int r, int64_t span, int64_t index,
                                    uint16_t* to) const {
        Words w[TURNS];
        decode_stages(decoder_, stored, decoder_.begin(stored, planes, numbers_[r], span, index), w);
        for (int v = 0; v < TURNS; ++v) store_words(to + (v * ROWS + r) * WORDS, w[v]);
    }
    QUANTLIB_INLINE void decode(int64_t span, uint16_t* to) const {
        for (int r = 0; r < ROWS; ++r) decode_row(WholeSpan(), whole_[r], r, span, span, to);
    }
    // The last span, where it is not stored whole.
    __attribute__((noinline)) void decode_tail(uint16_t* to) const {
        for (int r = 0; r < ROWS; ++r) decode_row(part_, tail_[r], r, inside_, 0, to);
    }
    static QUANTLIB_INLINE void add(const uint16_t* weights, const uint16_t* x, int64_t stride, Totals& total) {
#pragma GCC unroll 4
        for (int v = 0; v < TURNS; ++v) {
            Words w[ROWS];
            for (int r = 0; r < ROWS; ++r) w[r] = load_once(weights + (v * ROWS + r) * WORDS);
#pragma GCC unroll 8
            for (int m = 0; m < XS; ++m) {
                const Words a = load_once(x + m * stride + v * WORDS);
                for (int r = 0; r < ROWS; ++r) total[m][r] = dot(total[m][r], w[r], a);
            }
        }
    }
};

struct PairsSkinny {
    const LinearCall& call;
    const SkinnyX& x;
    const Run run;

    // Floats that rows() works in.
    static int64_t memory(const LinearCall& call, const Run& run) { return DotMemory<MOST_SKINNY_ROWS>::size(call, run); }

    // A row of x from the second-level cache should serve four rows of W. Three are the most that fit beside eight rows of x: 24 sums,
    // three vectors of W, one of x and what decodes; look-ups of bytes need eight registers more.
    void rows(int64_t start, int64_t stop, float* floats) const {
        with_rounding_decoder(*call.plan, [&](const auto& decoder) {
            constexpr int ROWS = std::decay_t<decltype(decoder)>::WIDTH == 1 ? 3 : 2;
            if (call.m <= FEW_XS) {
                this->multiply<4, FEW_XS>(decoder, start, stop, floats);
            } else {
                this->multiply<ROWS, MORE_XS>(decoder, start, stop, floats);
            }
        });
    }

  private:
    template <int ROWS, int XS, class Decoder>
    void multiply(const Decoder& kept, int64_t start, int64_t stop, float* floats) const {
        static_assert(ROWS <= MOST_SKINNY_ROWS);
        const Plan& plan = *call.plan;
        const auto expand = [&](int64_t row, int64_t rows, const RowNumbers& numbers) {
            expand_run(plan, call.parts, row, rows, run, numbers);
        };
        multiply_streams<ROWS>(call, start, stop, DotMemory<ROWS>(call, run, floats), expand,
                               [&](const int64_t(&which)[ROWS], const RowNumbers(&numbers)[ROWS], float* values) {
                                   const Decoder decoder = kept;  // a local copy stays in registers
                                   for (int64_t m = 0; m < call.m; m += XS, values += XS * ROWS * WRITE_ROWS) {
                                       const SkinnyX from = x.from_row(m);
                                       SkinnyProduct<Decoder, ROWS, XS>(decoder, call, which, numbers, from)
                                           .multiply(call.m - m, values);
                                   }
                               });
    }
};

inline bool pairs_skinny(const LinearCall& call) {
    const Plan& plan = *call.plan;
    if (call.m == 0 || plan.n == 0) return true;
    const int64_t spans = spans_of(plan.k), x_rows = round_up(call.m, call.m <= FEW_XS ? FEW_XS : MORE_XS);
    // Rows a multiple of 4096 bytes apart would all compete for the same few sets of the first-level cache.
    const int64_t x_stride = spans * SPAN + WORDS;
    const int threads = useful_threads(plan.n * spans * SPAN * call.m, call.threads);
    const Run run(plan, least(plan.padded_k, spans * SPAN));
    const int64_t thread_floats = round_up(PairsSkinny::memory(call, run), LANES);
    const Scratch words(x_rows * x_stride / 2), scratch(threads * thread_floats);
    if (words.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* arranged = reinterpret_cast<uint16_t*>(words.floats);
    for (int64_t m = 0; m < call.m; ++m) arrange_row(call, m, spans, parted(plan), arranged + m * x_stride);
    memset(arranged + call.m * x_stride, 0, (x_rows - call.m) * x_stride * sizeof(uint16_t));
    const SkinnyX x = {arranged, x_stride, spans};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        const PairsSkinny work{call, x, run};
        work.rows(plan.n * part / threads, plan.n * (part + 1) / threads, scratch.floats + part * thread_floats);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

// y[M, N] = x[M, K] W^T + bias for few rows of x, W in strips of sixteen rows (strips.h): a lane of every vector is a row of W. Codes
// become bf16 numbers in registers, which are multiplied with pairs of x that every lane shares; scales and zeros are applied to the
// fp32 sums of a block of columns, minima to those of x over it.
//
// Nothing is moved between lanes: sums are rows of y, and what a block costs it costs once for sixteen rows. Eight rows of x take one
// strip at a time, fewer take two, so that there are enough sums to hide how long a product takes.
//
// A row of y depends neither on the number of threads nor on the other rows of x: even and odd places of a block are added up apart.
#pragma once

#include "pairs_x.h"
#include "strip_codes.h"
#include "strip_numbers.h"

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

constexpr int STRIPS = 2;           // that a thread works on at once
constexpr int STRIP_XS = 8;         // rows of x at once
constexpr int EIGHTH = 8;           // columns of 32 bits of a strip's codes, at four bits

// Times eight columns that are multiplied.
inline int64_t eighths_of(const Plan& plan) { return StripNumbers::columns(plan) / EIGHTH; }
// Bytes of the first plane of a strip before a run of eight columns.
inline int64_t line_of(const Plan& plan, int64_t eighth) { return eighth * STRIP * PLANE_WIDTHS[plan.bits][0]; }

// x in runs of up to STRIP_XS rows: [K / 8][turn][plane][row] pairs of words, and the sums over each group, [group][row].
struct StripX {
    const uint16_t* words;
    const float* sums;  // null where no format needs them
    int64_t eighths, groups;
    int planes;

    // Rows of a run that begins with row m: as many as there is a kernel for.
    static int run(int64_t rows) { return rows > 4 ? STRIP_XS : rows > 2 ? 4 : int(rows); }
    static int64_t padded(int64_t m) { return m / STRIP_XS * STRIP_XS + (m % STRIP_XS == 0 ? 0 : run(m % STRIP_XS)); }
    int64_t row_words() const { return eighths * TURNS * planes * 2; }
    const uint16_t* from(int64_t m) const { return words + m * row_words(); }
    const float* sums_from(int64_t m) const { return sums + m * groups; }
};

// Where the pair of words of `turn` begins in eight columns, and how far apart they are: the order in which codes leave their places.
inline int first_of_pair(int bits, int turn) { return bits == 8 ? turn / 2 * 4 + turn % 2 : turn; }
inline int apart_in_pair(int bits) { return bits == 8 ? 2 : 4; }

// The pairs of one span of a run of rows of x, vectors [turn][plane][row] of sixteen times eight columns.
struct RunSpan {
    Words pairs[TURNS * MOST_PLANES * STRIP_XS];

    // Rows first ... first + count of `rows`; the others are zeros.
    void read(const LinearCall& call, int64_t first, int64_t count, int rows, int64_t span, int planes) {
        const int bits = call.plan->bits, apart = apart_in_pair(bits);
        const bool there = call.dtype == DType::bfloat16 && call.x_column_stride == 1 && (span + 1) * SPAN <= call.plan->k;
        uint16_t copied[MOST_PLANES][SPAN] = {};
        for (int m = 0; m < rows; ++m) {
            const uint16_t* natural = copied[0];
            if (m == count) memset(copied, 0, sizeof(copied));
            if (m < count && there) {
                natural = static_cast<const uint16_t*>(call.x) + (first + m) * call.x_row_stride + span * SPAN;
            } else if (m < count) {
                read_span(call, first + m, span, planes, copied);
            }
            for (int turn = 0; turn < TURNS; ++turn) {
                for (int plane = 0; plane < planes; ++plane) {
                    const int place = first_of_pair(bits, turn);
                    pairs[(turn * planes + plane) * rows + m] = pick_pairs(natural + plane * SPAN, place, apart);
                }
            }
        }
    }
    // to[eighth][turn][plane][row], `count` eighths of `vectors` = turns x planes x rows pairs.
    void write(int vectors, int64_t count, uint16_t* to) const {
        for (int start = 0; start < vectors; start += LANES) {
            const int taken = int(least(LANES, vectors - start));
            Ints square[LANES];
            for (int i = 0; i < LANES; ++i) square[i] = i < taken ? pairs[start + i] : _mm512_setzero_si512();
            transpose(square);
            const __mmask16 there = __mmask16((1 << taken) - 1);
            for (int64_t e = 0; e < count; ++e) _mm512_mask_storeu_epi32(to + (e * vectors + start) * 2, there, square[e]);
        }
    }
    // sums[eighth] of row m.
    void sum(int planes, int rows, int m, float* sums) const {
        Floats total = zero();
        for (int i = 0; i < TURNS * planes; ++i) total = dot(total, same_words(0x3F80), pairs[i * rows + m]);
        store(sums, total);
    }
};

// Rows first ... first + count of x, in a run of `rows`: pairs, and sums over groups of `group` columns where there is room for them.
inline void arrange_run(const LinearCall& call, const StripX& x, int64_t first, int64_t count, int rows, int64_t group, uint16_t* words,
                        float* sums) {
    constexpr int64_t EIGHTHS = SPAN / EIGHTH;
    const int vectors = TURNS * x.planes * rows;
    RunSpan span;
    float parts[STRIP_XS] = {};  // of each row's present group
    for (int64_t eighth = 0; eighth < x.eighths; eighth += EIGHTHS) {
        const int64_t there = least(EIGHTHS, x.eighths - eighth);
        span.read(call, first, count, rows, eighth / EIGHTHS, x.planes);
        span.write(vectors, there, words + eighth * vectors * 2);
        if (x.sums == nullptr) continue;
        for (int m = 0; m < rows; ++m) {
            float each[LANES];
            span.sum(x.planes, rows, m, each);
            for (int64_t e = 0; e < there; ++e) {
                parts[m] += each[e];
                const int64_t next = (eighth + e + 1) * EIGHTH;
                if (next % group != 0 && next < x.eighths * EIGHTH) continue;
                sums[(next - 1) / group * rows + m] = parts[m];
                parts[m] = 0.0f;
            }
        }
    }
}

// What strips are multiplied with in one run of groups.
struct StripGroups {
    Planes codes[STRIPS];
    const float *scales[STRIPS], *shifts[STRIPS];  // of the first group
    int64_t first, last;                           // eighths
    int64_t group;                                 // eighths
    const uint16_t* x;                             // of the first eighth
    const float* sums;                             // of the first group
    int planes;
    Shift shift;
};

// Every place of eight columns of COUNT strips times M rows of x.
template <int COUNT, int M, int PLANES, int STAGE = 0, class Codes>
QUANTLIB_INLINE void add_eighth(const Codes& codes, const typename Codes::Raw (&raw)[COUNT], const uint16_t*& x, int planes,
                                Floats (&sum)[COUNT][M][2]) {
    constexpr int WIDTH = TURNS / Codes::STAGES;
    Words w[COUNT][WIDTH];
#pragma GCC unroll 2
    for (int s = 0; s < COUNT; ++s) codes.template stage<STAGE>(raw[s], w[s]);
#pragma GCC unroll 2
    for (int v = 0; v < WIDTH; ++v) {
        for (int plane = 0; plane < (PLANES == 1 ? 1 : planes); ++plane) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const Words a = same_pairs(x + m * 2);
#pragma GCC unroll 2
                for (int s = 0; s < COUNT; ++s) {
                    Floats& total = sum[s][m][(STAGE * WIDTH + v) % 2];
                    total = dot(total, w[s][v], a);
                }
            }
            x += M * 2;
        }
    }
    if constexpr (STAGE + 1 < Codes::STAGES) add_eighth<COUNT, M, PLANES, STAGE + 1>(codes, raw, x, planes, sum);
}

// totals[s][m] += the products of COUNT strips with M rows of x over the groups' columns. By itself, so that its sums stay in registers.
template <int COUNT, int M, int PLANES, class Codes>
__attribute__((noinline)) void add_groups(const Codes& kept, const StripGroups& of, float* totals, int64_t totals_stride) {
    const Codes codes = kept;  // a local copy stays in registers
    const uint16_t* x = of.x;
    const float* sums = of.sums;
    const int planes = of.planes;
    Planes strip[COUNT];
    const float *scales[COUNT], *shifts[COUNT];
    Floats total[COUNT][M];
    for (int s = 0; s < COUNT; ++s) strip[s] = of.codes[s], scales[s] = of.scales[s], shifts[s] = of.shifts[s];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT * M; ++i) total[i / M][i % M] = load(totals + i / M * totals_stride + i % M * STRIP);
    for (int64_t eighth = of.first; eighth < of.last;) {
        const int64_t stop = least(eighth + of.group, of.last);
        Floats sum[COUNT][M][2];
#pragma GCC unroll 16
        for (int i = 0; i < COUNT * M * 2; ++i) sum[i / 2 / M][i / 2 % M][i % 2] = zero();
        for (; eighth < stop; ++eighth) {
            typename Codes::Raw raw[COUNT];
#pragma GCC unroll 2
            for (int s = 0; s < COUNT; ++s) raw[s] = codes.raw_of_strip(strip[s], eighth, STRIP_AHEAD);
            add_eighth<COUNT, M, PLANES>(codes, raw, x, planes, sum);
        }
#pragma GCC unroll 2  // else sums go through memory, here and above
        for (int s = 0; s < COUNT; ++s) {
            const Floats scale = load(scales[s]);
            scales[s] += STRIP;
            Floats shift = zero();
            if (of.shift != Shift::none) shift = load(shifts[s]), shifts[s] += STRIP;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                Floats all = add(sum[s][m][0], sum[s][m][1]);
                if (of.shift == Shift::zero) all = negative_multiply_add(shift, broadcast(sums[m]), all);
                total[s][m] = multiply_add(all, scale, total[s][m]);
                if (of.shift == Shift::minimum) total[s][m] = negative_multiply_add(shift, broadcast(sums[m]), total[s][m]);
            }
        }
        sums += M;
    }
#pragma GCC unroll 8
    for (int i = 0; i < COUNT * M; ++i) store(totals + i / M * totals_stride + i % M * STRIP, total[i / M][i % M]);
}

struct PairsStrip {
    const LinearCall& call;
    const StripX& x;
    const StripNumbers& numbers;

    // Floats that rows() works in.
    static int64_t floats(const Joined<LinearCall>& joined, const StripNumbers& numbers) {
        int64_t whole = 0;
        for (int64_t i = 0; i < joined.count; ++i) whole = most(whole, WholeStrip::floats(*joined.calls[i].plan));
        return STRIPS * (totals_stride(joined.calls[0]) + round_up(numbers.floats(), LANES)) + whole;
    }

    void rows(int64_t start, int64_t stop, float* memory) const {
        with_codes(*call.plan, [&](const auto& codes) {
            if (x.planes == 1) return this->all_rows<1>(codes, start, stop, memory);
            return this->all_rows<MOST_PLANES>(codes, start, stop, memory);
        });
    }

  private:
    static int64_t totals_stride(const LinearCall& call) { return StripX::padded(call.m) * STRIP; }

    template <int COUNT, int PLANES, class Codes>
    inline void add_run(const Codes& codes, int run, const StripGroups& of, float* totals, int64_t stride) const {
        if constexpr (COUNT == 1) {
            add_groups<1, STRIP_XS, PLANES>(codes, of, totals, stride);
        } else {
            if (run == 4) return add_groups<COUNT, 4, PLANES>(codes, of, totals, stride);
            if (run == 2) return add_groups<COUNT, 2, PLANES>(codes, of, totals, stride);
            add_groups<COUNT, 1, PLANES>(codes, of, totals, stride);
        }
    }

    // Two streams of strips, half of the range apart: memory delivers several faster than one.
    template <int PLANES, class Codes>
    void all_rows(const Codes& codes, int64_t start, int64_t stop, float* memory) const {
        const Plan& plan = *call.plan;
        const int64_t stride = totals_stride(call), number_floats = round_up(numbers.floats(), LANES);
        float* const totals = memory;
        StripNumbers::Memory of_strip[STRIPS] = {{numbers, memory + STRIPS * stride},
                                                 {numbers, memory + STRIPS * stride + number_floats}};
        const WholeStrip whole(call, memory + STRIPS * (stride + number_floats));
        const int64_t strips = (stop - start + STRIP - 1) / STRIP, half = (strips + 1) / 2;
        const int64_t group = numbers.group() / EIGHTH, run_groups = call.m <= 4 ? numbers.few_groups() : numbers.groups();
        for (int64_t i = 0; i < half; ++i) {
            const int64_t row[STRIPS] = {start + i * STRIP, start + least(half + i, strips - 1) * STRIP};
            StripGroups of;
            of.group = group, of.planes = x.planes, of.shift = shift_of(plan);
            for (int s = 0; s < STRIPS; ++s) {
                of_strip[s].begin(call.parts, row[s], least(STRIP, plan.n - row[s]));
                of.codes[s] = whole.planes(row[s]);
                of.scales[s] = of_strip[s].scales(), of.shifts[s] = of_strip[s].shifts();
            }
            memset(totals, 0, STRIPS * stride * sizeof(float));
            for (int64_t g = 0; g < x.groups; g += run_groups) {
                of.first = g * group, of.last = least((g + run_groups) * group, x.eighths);
                const auto fill = [&](int s) {
                    const uint8_t* next = of.codes[s].plane[0] + line_of(plan, of.first) + STRIP_AHEAD;
                    of_strip[s].fill(g, least(run_groups, x.groups - g), next);
                };
                // Of whole runs, one strip after the other: what is in the first-level cache is half of it.
                const bool whole_runs = call.m % STRIP_XS == 0;
                for (int s = 0; s < STRIPS && !whole_runs; ++s) fill(s);
                for (int64_t m = 0; m < call.m; m += STRIP_XS) {
                    const int run = StripX::run(least(STRIP_XS, call.m - m));
                    of.x = x.from(m) + of.first * TURNS * x.planes * run * 2;
                    of.sums = x.sums == nullptr ? nullptr : x.sums_from(m) + g * run;
                    if (run < STRIP_XS) {
                        add_run<STRIPS, PLANES>(codes, run, of, totals + m * STRIP, stride);
                        continue;
                    }
                    for (int s = 0; s < STRIPS; ++s) {
                        if (whole_runs && m == 0) fill(s);
                        StripGroups one = of;
                        one.codes[0] = of.codes[s], one.scales[0] = of.scales[s], one.shifts[0] = of.shifts[s];
                        add_run<1, PLANES>(codes, run, one, totals + s * stride + m * STRIP, stride);
                    }
                }
            }
            for (int s = 0; s < STRIPS; ++s) write_products(call, row[s], least(STRIP, plan.n - row[s]), totals + s * stride, STRIP);
        }
    }
};

inline bool pairs_strip(const Joined<LinearCall>& joined) {
    const LinearCall& first = joined.calls[0];
    const Plan& plan = *first.plan;
    const int64_t rows = rows_of(joined);
    if (first.m == 0 || rows == 0) return true;
    const StripNumbers numbers(plan);
    const int planes = planes_in(first.dtype);
    const int64_t eighths = eighths_of(plan), groups = numbers.groups_across();
    const int64_t padded = StripX::padded(first.m), sums_floats = shift_of(plan) == Shift::none ? 0 : padded * groups;
    const int threads = useful_threads(rows * plan.padded_k * first.m, first.threads);
    const int64_t thread_floats = round_up(PairsStrip::floats(joined, numbers), LANES);
    const Scratch words(padded * eighths * TURNS * planes), sums(sums_floats), scratch(threads * thread_floats);
    if (words.floats == nullptr || sums.floats == nullptr || scratch.floats == nullptr) return false;

    uint16_t* arranged = reinterpret_cast<uint16_t*>(words.floats);
    const StripX x = {arranged, sums_floats == 0 ? nullptr : sums.floats, eighths, groups, planes};
    for (int64_t m = 0; m < first.m; m += STRIP_XS) {
        const int64_t count = least(STRIP_XS, first.m - m);
        arrange_run(first, x, m, count, StripX::run(count), numbers.group(), arranged + m * x.row_words(), sums.floats + m * groups);
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        const auto rows = [&](const LinearCall& call, int64_t start, int64_t stop) {
            if (start == stop) return;
            const PairsStrip work{call, x, numbers};
            work.rows(start, stop, scratch.floats + part * thread_floats);
        };
        for_rows(joined, part, threads, rows, STRIP);
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

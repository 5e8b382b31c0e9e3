// From strips to weights in bf16: the law in fp32, rounded once.
#pragma once

#include "pairs_strip.h"

#include <type_traits>

#ifdef QUANTLIB_HAS_PAIRS
namespace quantlib::cpu::QUANTLIB_ISA {

// The numbers of eight columns of a strip, turn by turn, in fp32: those of the low and of the high words that pairs are made of.
template <class Codes>
struct WordNumbers {  // that bf16 holds
    static constexpr int STAGES = Codes::STAGES;
    using Raw = typename Codes::Raw;
    const Codes codes;
    explicit WordNumbers(const Plan& plan) : codes(plan) {}
    QUANTLIB_INLINE Raw raw_of_strip(const Planes& strip, int64_t eighth, int64_t ahead) const {
        return codes.raw_of_strip(strip, eighth, ahead);
    }
    template <int STAGE>
    QUANTLIB_INLINE void stage(const Raw& raw, Floats* low, Floats* high) const {
        Words w[TURNS / STAGES];
        codes.template stage<STAGE>(raw, w);
        for (int v = 0; v < TURNS / STAGES; ++v) low[v] = low_floats(w[v]), high[v] = high_floats(w[v]);
    }
};
// Of four bits: any numbers, by look-ups of 32 bits, which ignore the bits above a code.
struct NibbleNumbers {
    static constexpr int STAGES = TURNS;
    using Raw = Words;
    const Floats values;
    explicit NibbleNumbers(const Plan& plan) : values(load(plan.values)) {}
    QUANTLIB_INLINE Raw raw_of_strip(const Planes& strip, int64_t eighth, int64_t ahead) const {
        return strip_plane<4>(strip.plane[0], eighth, ahead);
    }
    template <int STAGE>
    QUANTLIB_INLINE void stage(const Raw& raw, Floats* low, Floats* high) const {
        *low = permute(_mm512_srli_epi32(raw, 4 * STAGE), values);
        *high = permute(_mm512_srli_epi32(raw, 16 + 4 * STAGE), values);
    }
};

// Eight columns of a strip -> bf16 weights, a vector every APART words.
template <Shift SHIFT, int64_t APART, int STAGE = 0, class Numbers>
QUANTLIB_INLINE void round_eighth(const Numbers& numbers, const typename Numbers::Raw& raw, Floats scale, Floats shift, uint16_t* to) {
    constexpr int WIDTH = TURNS / Numbers::STAGES;
    Floats low[WIDTH], high[WIDTH];
    numbers.template stage<STAGE>(raw, low, high);
    for (int v = 0; v < WIDTH; ++v) {
        // Rounding leaves the low words of all lanes in front of the high ones.
        const Words rounded = round_words(scaled<SHIFT>(low[v], scale, shift), scaled<SHIFT>(high[v], scale, shift));
        store_words(to + (STAGE * WIDTH + v) * APART, mix_words(rounded));
    }
    if constexpr (STAGE + 1 < Numbers::STAGES) round_eighth<SHIFT, APART, STAGE + 1>(numbers, raw, scale, shift, to);
}

// Call `with` what decodes this plan's numbers, and what is subtracted from them.
template <class With>
inline void with_strip_numbers(const Plan& plan, With with) {
    with_decoder(plan, [&](const auto& codes, auto shifted) {
        using Codes = std::decay_t<decltype(codes)>;
        using Numbers = std::conditional_t<std::is_same_v<Codes, BookCodes<4>>, NibbleNumbers, WordNumbers<Codes>>;
        with(Numbers(plan), shifted);
    });
}

// Call each(eighth, end, place) for what eighths first ... last have of every group, in ascending order; its scales and shifts in the
// memories of COUNT strips are `place` floats behind the first. `ahead`: bytes to the codes that are wanted next.
template <int COUNT, class Each>
QUANTLIB_INLINE void for_groups(const StripNumbers& numbers, const Planes (&strip)[COUNT], StripNumbers::Memory (&of_strip)[COUNT],
                                int64_t first, int64_t last, int64_t ahead, Each each) {
    const int64_t group = numbers.group() / EIGHTH, stop = (last + group - 1) / group, unit = numbers.whole_groups();
    for (int64_t g = first / group / unit * unit; g < stop; g += unit) {
        for (int s = 0; s < COUNT; ++s) {
            const uint8_t* next = strip[s].plane[0] + line_of(numbers.plan(), g * group) + ahead;
            of_strip[s].fill(g, least(unit, numbers.groups_across() - g), next);
        }
        for (int64_t i = most(g, first / group); i < least(g + unit, stop); ++i) {
            each(most(i * group, first), least((i + 1) * group, last), (i - g) * STRIP);
        }
    }
}

// Eighths first ... last of a strip, as round_eighth leaves them one after the other.
template <Shift SHIFT, int64_t APART, class Codes>
inline void round_strip(const Codes& kept, const StripNumbers& numbers, const Planes (&strip)[1], StripNumbers::Memory (&of_strip)[1],
                        int64_t first, int64_t last, int64_t ahead, uint16_t* to) {
    const Codes codes = kept;  // a local copy stays in registers
    for_groups(numbers, strip, of_strip, first, last, ahead, [&](int64_t eighth, int64_t end, int64_t place) QUANTLIB_LAMBDA {
        const Floats scale = load(of_strip[0].scales() + place);
        const Floats shift = SHIFT == Shift::none ? zero() : load(of_strip[0].shifts() + place);
        for (; eighth < end; ++eighth, to += TURNS * APART) {
            round_eighth<SHIFT, APART>(codes, codes.raw_of_strip(strip[0], eighth, ahead), scale, shift, to);
        }
    });
}

}  // namespace quantlib::cpu::QUANTLIB_ISA
#endif

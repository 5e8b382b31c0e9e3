// Words by which Python names kinds.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

#include "types.h"

namespace quantlib::cpu {

inline constexpr std::pair<const char*, DType> DTYPES[] = {
    {"float32", DType::float32}, {"bfloat16", DType::bfloat16}, {"float16", DType::float16}};

// Throws std::invalid_argument where the word is unknown.
template <class Kind, size_t COUNT>
inline Kind parse(const std::pair<const char*, Kind> (&words)[COUNT], const std::string& word) {
    std::string known;
    for (const auto& [name, kind] : words) {
        if (word == name) return kind;
        known += (known.empty() ? "" : ", ") + std::string(name);
    }
    throw std::invalid_argument("unknown kind " + word + ": expected one of " + known);
}

// Raises where a product that takes bf16 x alone is given another.
inline void check_bf16(DType dtype) {
    if (dtype != DType::bfloat16) throw std::invalid_argument("multiplies bf16 x alone");
}

// Raises where rows are no whole runs of eight columns, or a plane of one is no whole words of 32 bits.
inline void check_words(const char* what, const Plan& plan) {
    if (plan.padded_k % 8 == 0 && plan.padded_k * (plan.bits & -plan.bits) % 32 == 0) return;
    throw std::invalid_argument(std::string(what) + " rows of whole runs of eight columns, and planes of whole words of 32 bits");
}

// Raises where a product doesn't read the layout that the plan's weight lies in.
inline void check_layout(Reads reads, const Plan& plan) {
    if (reads == Reads::words) return check_words("reads", plan);
    if (reads == Reads::both || (reads == Reads::strips) == plan.strips) return;
    throw std::invalid_argument(plan.strips ? "reads weights in the layout rows, not in cpu_rows"
                                            : "reads weights in the layout cpu_rows, not in rows");
}

}  // namespace quantlib::cpu

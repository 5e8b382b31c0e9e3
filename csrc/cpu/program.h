// A model's forward pass for one token, as a list of calls whose addresses never change: the host's share of a token is one call.
//
//     token --embed--> hidden --norm--> x --products--> q, k, v --rotate--> q, cache --attention--> product --add--> hidden ...
//
// Whoever builds it keeps every address alive. Compiled for the baseline; the work is done by the table of kernels.
#pragma once

#include <variant>
#include <vector>

#include "decoding_types.h"

namespace quantlib::cpu {

using Product = bool (*Kernels::*)(const Joined<LinearCall>&);

// Row `token` of a table -> y.
struct EmbedStep {
    const void* table;
    void* y;
    int64_t rows, row_bytes;
};

// Products with the same x, as in Joined.
struct ProductStep {
    Product kernel;
    std::vector<LinearCall> calls;
    bool gated;
};

struct DenseStep {
    std::vector<DenseCall> calls;
    bool gated;
};

// Of the token's position: angles, and the place in a cache [heads, capacity, width], move with it.
struct RotateStep {
    RotateCall call;
    bool cached;
};

struct AttentionStep {
    AttentionCall call;
};

using Step = std::variant<EmbedStep, Int8RowsCall, ProductStep, NormCall, RotateStep, AttentionStep, GateCall, AddCall, DenseStep>;

struct Program {
    int64_t capacity;  // positions
    std::vector<Step> steps;

    // Every step for a token at a position. Throws std::invalid_argument for one out of range, std::bad_alloc.
    void run(int64_t token, int64_t position) const;
};

}  // namespace quantlib::cpu

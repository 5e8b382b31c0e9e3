// The small steps of decoding.h for many positions at once: each position's as there, parted among threads.
#pragma once

#include "decoding.h"

namespace quantlib::cpu::QUANTLIB_ISA {

// Call part(start, stop) for a share of `count` each, of which each costs `work`; false where one of them is.
template <class Part>
inline bool in_parts(int64_t count, int64_t work, int threads, Part part) {
    const int used = useful_threads(count * work, threads);
    bool done = true;
#pragma omp parallel for schedule(static) num_threads(used) reduction(&& : done)
    for (int i = 0; i < used; ++i) done = part(count * i / used, count * (i + 1) / used) && done;
    return done;
}

inline bool prompt_norm(const NormCall& call, int threads) {
    return in_parts(call.rows, call.width, threads, [&](int64_t start, int64_t stop) {
        NormCall own = call;
        own.x = at(call.x, call.dtype, start * call.width), own.y = at(call.y, call.dtype, start * call.width);
        own.rows = stop - start;
        return rms_norm(own);
    });
}

inline bool prompt_gate(const GateCall& call, int threads) {
    const int64_t chunks = (call.count + CHUNK - 1) / CHUNK;
    return in_parts(chunks, 4 * CHUNK, threads, [&](int64_t first, int64_t last) {
        const int64_t start = first * CHUNK;
        return gate({call.dtype, at(call.gate, call.dtype, start), at(call.up, call.dtype, start), at(call.y, call.dtype, start),
                     least(call.count, last * CHUNK) - start});
    });
}

inline bool prompt_rotate(const PromptRotateCall& call, int threads) {
    const RotateCall& first = call.first;
    return in_parts(call.positions, first.heads * first.width, threads, [&](int64_t start, int64_t stop) {
        bool done = true;
        for (int64_t m = start; m < stop; ++m) {
            RotateCall own = first;
            own.x = at(first.x, first.dtype, m * first.heads * first.width);
            own.y = at(first.y, first.dtype, m * call.y_position_stride);
            if (first.cosine != nullptr) {
                own.cosine = at(first.cosine, first.dtype, m * first.width), own.sine = at(first.sine, first.dtype, m * first.width);
            }
            done = rotate(own) && done;
        }
        return done;
    });
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

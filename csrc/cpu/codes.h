// From packed codes to fp32 weights, CHUNK columns at a time, in registers: the law of quantlib/formats/base.py,
//     w = (value[code] - zero) * scale - minimum          each operation rounded once (setup.py turns contraction off).
//
// Up to four bits every codec is a code book of 16 entries in registers, and the law is applied to the book, once per piece of
// columns, instead of to every weight. Wider codes are computed (integers, E4M3, E5M2) or gathered from the table.
#pragma once

#include "planes.h"
#include "scales.h"

namespace quantlib::cpu::QUANTLIB_ISA {

// Codecs of more than four bits: the values of one chunk, before the law.

template <int BITS>
struct AffineCodec {
    static inline void values(const Plan& plan, const Planes& planes, int64_t chunk, Floats* out) {
        Ints codes[VECTORS];
        unpack_codes<BITS>(planes, chunk, codes);
        const Floats offset = broadcast(plan.offset);
        for (int v = 0; v < VECTORS; ++v) out[v] = subtract(number(clean<BITS>(codes[v])), offset);
    }
};

template <int BITS>
struct TableCodec {
    static inline void values(const Plan& plan, const Planes& planes, int64_t chunk, Floats* out) {
        Ints codes[VECTORS];
        unpack_codes<BITS>(planes, chunk, codes);
        for (int v = 0; v < VECTORS; ++v) out[v] = gather(plan.values, clean<BITS>(codes[v]));
    }
};

struct E4M3Codec {
    static inline void values(const Plan&, const Planes& planes, int64_t chunk, Floats* out) {
        for (int v = 0; v < VECTORS; ++v) out[v] = load_e4m3(planes.plane[0] + chunk * CHUNK + v * LANES);
    }
};

struct E5M2Codec {
    static inline void values(const Plan&, const Planes& planes, int64_t chunk, Floats* out) {
        for (int v = 0; v < VECTORS; ++v) out[v] = load_e5m2(planes.plane[0] + chunk * CHUNK + v * LANES);
    }
};

// Weights of one chunk = law(values of one chunk). SHIFTED: the format has a zero or a minimum.

template <class Codec, int PIECE, bool SHIFTED>
struct Computed {
    static constexpr int PIECES = CHUNK / PIECE;
    explicit Computed(const Plan& p) : plan(p) {}
    const Plan& plan;

    inline void weights(const Planes& planes, const RowNumbers& numbers, int64_t chunk, Floats* out) const {
        Codec::values(plan, planes, chunk, out);
        for (int v = 0; v < VECTORS; ++v) {
            if constexpr (SHIFTED) out[v] = subtract(out[v], spread<PIECE>(numbers.zero + chunk * PIECES, v));
            out[v] = multiply(out[v], spread<PIECE>(numbers.scale + chunk * PIECES, v));
            if constexpr (SHIFTED) out[v] = subtract(out[v], spread<PIECE>(numbers.minimum + chunk * PIECES, v));
        }
    }
};

template <int BITS, int PIECE, bool SHIFTED>
struct Booked {
    static constexpr int PIECES = CHUNK / PIECE;
    explicit Booked(const Plan& plan) : base(book(plan.values)) {}
    const Book base;

    inline void weights(const Planes& planes, const RowNumbers& numbers, int64_t chunk, Floats* out) const {
        Ints codes[VECTORS];
        unpack_codes<BITS>(planes, chunk, codes);
        const float* scale = numbers.scale + chunk * PIECES;
        const float* zero = numbers.zero + chunk * PIECES;
        const float* minimum = numbers.minimum + chunk * PIECES;
        if constexpr (SCALES_BOOK && PIECE >= LANES) {
            constexpr int RUN = PIECE / LANES;
            for (int v = 0; v < VECTORS; v += RUN) {
                const int p = v / RUN;
                const Book scaled = SHIFTED ? rescale(base, zero[p], scale[p], minimum[p]) : rescale(base, scale[p]);
                for (int i = v; i < v + RUN; ++i) out[i] = look_up<BITS>(scaled, codes[i]);
            }
        } else {
            for (int v = 0; v < VECTORS; ++v) {
                out[v] = look_up<BITS>(base, codes[v]);
                if constexpr (SHIFTED) out[v] = subtract(out[v], spread<PIECE>(zero, v));
                out[v] = multiply(out[v], spread<PIECE>(scale, v));
                if constexpr (SHIFTED) out[v] = subtract(out[v], spread<PIECE>(minimum, v));
            }
        }
    }
};

// What happens to decoded chunks: a sink takes the vectors of chunk after chunk; `skip` moves its chunk 0.

struct StoreSink {
    float* to;
    inline void skip(int64_t chunks) { to += chunks * CHUNK; }
    inline void take(int64_t chunk, const Floats* weights) {
        for (int v = 0; v < VECTORS; ++v) store(to + chunk * CHUNK + v * LANES, weights[v]);
    }
};

// The product with one row of x, in the order of linear.h's tile: even and odd vectors in two chains.
struct DotSink {
    const float* x;
    Floats chain[2];
    inline void skip(int64_t chunks) { x += chunks * CHUNK; }
    inline void take(int64_t chunk, const Floats* weights) {
        for (int v = 0; v < VECTORS; ++v) {
            chain[v & 1] = multiply_add(weights[v], load(x + chunk * CHUNK + v * LANES), chain[v & 1]);
        }
    }
};

template <class Sink>
using DecodeLoop = void (*)(const Plan&, const Planes&, const RowNumbers&, int64_t chunks, Sink&);

template <class Decoder, class Sink>
void decode_loop(const Plan& plan, const Planes& planes, const RowNumbers& numbers, int64_t chunks, Sink& out) {
    const Decoder decoder(plan);
    Sink sink = out;  // a local copy stays in registers
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        Floats weights[VECTORS];
        decoder.weights(planes, numbers, chunk, weights);
        sink.take(chunk, weights);
    }
    out = sink;
}

template <class Sink, class Codec>
inline DecodeLoop<Sink> pick_computed(const Plan& plan) {
    const bool shifted = plan.has_zero || plan.has_minimum;
    if (plan.piece == 32) {
        return shifted ? decode_loop<Computed<Codec, 32, true>, Sink> : decode_loop<Computed<Codec, 32, false>, Sink>;
    }
    if (plan.piece == 16) {
        return shifted ? decode_loop<Computed<Codec, 16, true>, Sink> : decode_loop<Computed<Codec, 16, false>, Sink>;
    }
    return shifted ? decode_loop<Computed<Codec, 8, true>, Sink> : decode_loop<Computed<Codec, 8, false>, Sink>;
}

template <class Sink, int BITS>
inline DecodeLoop<Sink> pick_booked(const Plan& plan) {
    const bool shifted = plan.has_zero || plan.has_minimum;
    if (plan.piece == 32) {
        return shifted ? decode_loop<Booked<BITS, 32, true>, Sink> : decode_loop<Booked<BITS, 32, false>, Sink>;
    }
    if (plan.piece == 16) {
        return shifted ? decode_loop<Booked<BITS, 16, true>, Sink> : decode_loop<Booked<BITS, 16, false>, Sink>;
    }
    return shifted ? decode_loop<Booked<BITS, 8, true>, Sink> : decode_loop<Booked<BITS, 8, false>, Sink>;
}

template <class Sink, int BITS>
inline DecodeLoop<Sink> pick_wide(const Plan& plan) {
    if (plan.codec == CodecKind::affine) return pick_computed<Sink, AffineCodec<BITS>>(plan);
    return pick_computed<Sink, TableCodec<BITS>>(plan);
}

// The loop that decodes this plan's rows into a sink.
template <class Sink>
inline DecodeLoop<Sink> pick_loop(const Plan& plan) {
    if (plan.codec == CodecKind::e4m3) return pick_computed<Sink, E4M3Codec>(plan);
    if (plan.codec == CodecKind::e5m2) return pick_computed<Sink, E5M2Codec>(plan);
    switch (plan.bits) {
        case 1: return pick_booked<Sink, 1>(plan);
        case 2: return pick_booked<Sink, 2>(plan);
        case 3: return pick_booked<Sink, 3>(plan);
        case 4: return pick_booked<Sink, 4>(plan);
        case 5: return pick_wide<Sink, 5>(plan);
        case 6: return pick_wide<Sink, 6>(plan);
        case 7: return pick_wide<Sink, 7>(plan);
        default: return pick_wide<Sink, 8>(plan);
    }
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

// The small steps between products of one token: sums are fp32; a result is rounded to the dtype wherever a model written in
// torch would round it, so that both agree. No result depends on the number of threads.
#pragma once

#include "rows.h"

namespace quantlib::cpu::QUANTLIB_ISA {

inline bool rms_norm(const NormCall& call) {
    with_dtype(call.dtype, [&](auto typed) {
        constexpr DType D = decltype(typed)::dtype;
        for (int64_t row = 0; row < call.rows; ++row) {
            const uint8_t *x = at(call.x, D, row * call.width), *weight = at(call.weight, D, 0);
            uint8_t* y = at(call.y, D, row * call.width);
            Floats squares = zero();
            for_vectors(call.width, [&](auto vector, int64_t i) QUANTLIB_LAMBDA {
                const Floats numbers = vector.template load<D>(at(x, D, i));
                squares = multiply_add(numbers, numbers, squares);
            });
            const Floats factor = broadcast(1.0f / __builtin_sqrtf(sum(squares) / float(call.width) + call.epsilon));
            for_vectors(call.width, [&](auto vector, int64_t i) QUANTLIB_LAMBDA {
                const Floats normed = round_as<D>(multiply(vector.template load<D>(at(x, D, i)), factor));
                vector.template store<D>(at(y, D, i), multiply(normed, vector.template load<D>(at(weight, D, i))));
            });
        }
    });
    return true;
}

// One head: y = x cosine + (x's halves exchanged, the first negative) sine.
template <DType D>
inline void rotate_head(const RotateCall& call, const uint8_t* x, uint8_t* y) {
    const int64_t half = call.width / 2;
    for_vectors(half, [&](auto vector, int64_t i) QUANTLIB_LAMBDA {
        const auto part = [&](const void* from, int64_t column) QUANTLIB_LAMBDA {
            return vector.template load<D>(at(from, D, column));
        };
        const auto turned = [&](Floats a, Floats other, int64_t column) QUANTLIB_LAMBDA {
            return add(round_as<D>(multiply(a, part(call.cosine, column))), round_as<D>(multiply(other, part(call.sine, column))));
        };
        const Floats low = part(x, i), high = part(x, half + i);
        vector.template store<D>(at(y, D, i), turned(low, subtract(zero(), high), i));
        vector.template store<D>(at(y, D, half + i), turned(high, low, half + i));
    });
}

inline bool rotate(const RotateCall& call) {
    with_dtype(call.dtype, [&](auto typed) {
        constexpr DType D = decltype(typed)::dtype;
        for (int64_t head = 0; head < call.heads; ++head) {
            const uint8_t* x = at(call.x, D, head * call.width);
            uint8_t* y = at(call.y, D, head * call.y_stride);
            if (call.cosine == nullptr) {
                memmove(y, x, call.width * item_size(D));
            } else {
                rotate_head<D>(call, x, y);
            }
        }
    });
    return true;
}

// One head of attention over rows of D; q is fp32, scores [positions rounded up to whole vectors], sums [width].
template <DType D>
inline void attend(const AttentionCall& call, int64_t head, const float* q, float* scores, float* sums) {
    constexpr int SIZE = D == DType::float32 ? 4 : 2;
    const int64_t group = head / (call.heads / call.key_heads), first = group * call.capacity * call.width;
    const uint8_t *keys = at(call.keys, D, first), *values = at(call.values, D, first);
    float greatest = -__builtin_inff();
    for (int64_t t = 0; t < call.positions; ++t) {
        const uint8_t* key = keys + t * call.width * SIZE;
        Floats products = zero();
        for (int64_t i = 0; i < call.width; i += LANES) {
            products = multiply_add(load(q + i), load_as<D>(key + i * SIZE), products);
        }
        scores[t] = sum(products) * call.scale;
        if (scores[t] > greatest) greatest = scores[t];
    }
    const int64_t padded = round_up(call.positions, LANES);
    for (int64_t t = call.positions; t < padded; ++t) scores[t] = -__builtin_inff();
    Floats total = zero();
    for (int64_t t = 0; t < padded; t += LANES) {
        const Floats weight = exponential(subtract(load(scores + t), broadcast(greatest)));
        store(scores + t, weight);
        total = add(total, weight);
    }
    memset(sums, 0, call.width * sizeof(float));
    for (int64_t t = 0; t < call.positions; ++t) {
        const Floats weight = broadcast(scores[t]);
        const uint8_t* value = values + t * call.width * SIZE;
        for (int64_t i = 0; i < call.width; i += LANES) {
            store(sums + i, multiply_add(weight, load_as<D>(value + i * SIZE), load(sums + i)));
        }
    }
    const Floats share = broadcast(1.0f / sum(total));
    for (int64_t i = 0; i < call.width; i += LANES) store(sums + i, multiply(load(sums + i), share));
}

inline bool attention(const AttentionCall& call) {
    const int64_t own = round_up(call.positions, CHUNK) + 2 * round_up(call.width, CHUNK);
    const int threads = useful_threads(call.heads * call.positions * call.width, call.threads);
    const Scratch scratch(threads * own);
    if (scratch.floats == nullptr) return false;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; ++thread) {
        float *q = scratch.floats + thread * own, *sums = q + round_up(call.width, CHUNK);
        float* scores = sums + round_up(call.width, CHUNK);
        for (int64_t head = call.heads * thread / threads; head < call.heads * (thread + 1) / threads; ++head) {
            read_numbers(call.dtype, at(call.q, call.dtype, head * call.width), call.width, q);
            with_dtype(call.dtype, [&](auto typed) { attend<decltype(typed)::dtype>(call, head, q, scores, sums); });
            write_numbers(call.dtype, sums, call.width, at(call.y, call.dtype, head * call.width));
        }
    }
    return true;
}

inline bool add_to(const AddCall& call) {
    with_dtype(call.dtype, [&](auto typed) {
        constexpr DType D = decltype(typed)::dtype;
        combine_vectors<D>(call.y, call.x, call.y, call.count, [](Floats y, Floats x) QUANTLIB_LAMBDA { return add(x, y); });
    });
    return true;
}

// Rows [start, stop) of W, each as four chains of sums.
template <DType D>
inline void dense_rows(const DenseCall& call, const float* x, int64_t start, int64_t stop) {
    constexpr int SIZE = D == DType::float32 ? 4 : 2;
    const int64_t whole = call.k / CHUNK * CHUNK;
    for (int64_t row = start; row < stop; ++row) {
        const uint8_t* weight = at(call.weight, D, row * call.k);
        Floats chains[4] = {zero(), zero(), zero(), zero()};
        for (int64_t column = 0; column < whole; column += CHUNK) {
            fetch_near(weight + column * SIZE + 1024);
            for (int v = 0; v < VECTORS; ++v) {
                const int64_t i = column + v * LANES;
                chains[v % 4] = multiply_add(load(x + i), load_as<D>(weight + i * SIZE), chains[v % 4]);
            }
        }
        float rest[CHUNK] = {}, value = sum(add(add(chains[0], chains[1]), add(chains[2], chains[3])));
        if (whole < call.k) read_numbers(D, weight + whole * SIZE, call.k - whole, rest);
        for (int64_t column = whole; column < call.k; ++column) value += rest[column - whole] * x[column];
        if (call.bias != nullptr) {
            float bias;
            read_numbers(D, at(call.bias, D, row), 1, &bias);
            value += bias;
        }
        write_numbers(D, &value, 1, at(call.y, D, row));
    }
}

inline bool dense(const Joined<DenseCall>& joined) {
    const DenseCall& first = joined.calls[0];
    const Scratch scratch(round_up(first.k, CHUNK));
    if (scratch.floats == nullptr) return false;
    read_numbers(first.dtype, first.x, first.k, scratch.floats);
    const int threads = useful_threads(rows_of(joined) * first.k, first.threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        for_rows(joined, part, threads, [&](const DenseCall& call, int64_t start, int64_t stop) {
            with_dtype(call.dtype, [&](auto typed) { dense_rows<decltype(typed)::dtype>(call, scratch.floats, start, stop); });
        });
    }
    return true;
}

}  // namespace quantlib::cpu::QUANTLIB_ISA

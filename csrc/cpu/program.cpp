#include "program.h"

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace quantlib::cpu {

namespace {

struct Runner {
    const Kernels& kernels;
    int64_t token, position;

    bool operator()(const EmbedStep& step) const {
        if (token < 0 || token >= step.rows) {
            throw std::invalid_argument("token " + std::to_string(token) + " lies outside the vocabulary of " +
                                        std::to_string(step.rows));
        }
        std::memcpy(step.y, static_cast<const char*>(step.table) + token * step.row_bytes, step.row_bytes);
        return true;
    }

    bool operator()(const ProductStep& step) const {
        const auto kernel = kernels.*step.kernel;
        if (kernel == nullptr) throw std::invalid_argument("the instruction set " + isa() + " lacks a product of the program");
        return kernel({step.calls.data(), int64_t(step.calls.size()), step.gated});
    }

    bool operator()(const RotateStep& step) const {
        RotateCall call = step.call;
        const int64_t moved = position * call.width * (call.dtype == DType::float32 ? 4 : 2);
        if (call.cosine != nullptr) {
            call.cosine = static_cast<const char*>(call.cosine) + moved;
            call.sine = static_cast<const char*>(call.sine) + moved;
        }
        if (step.cached) call.y = static_cast<char*>(call.y) + moved;
        return kernels.rotate(call);
    }

    bool operator()(const AttentionStep& step) const {
        AttentionCall call = step.call;
        call.positions = position + 1;
        return kernels.attention(call);
    }

    bool operator()(const Int8RowsCall& call) const { return kernels.rows_to_int8(call); }
    bool operator()(const NormCall& call) const { return kernels.rms_norm(call); }
    bool operator()(const GateCall& call) const { return kernels.gate(call); }
    bool operator()(const AddCall& call) const { return kernels.add_to(call); }
    bool operator()(const DenseStep& step) const {
        return kernels.dense({step.calls.data(), int64_t(step.calls.size()), step.gated});
    }
};

}  // namespace

void Program::run(int64_t token, int64_t position) const {
    if (position < 0 || position >= capacity) {
        throw std::invalid_argument("position " + std::to_string(position) + " lies outside the cache's " +
                                    std::to_string(capacity) + " positions");
    }
    const Runner runner = {kernels(), token, position};
    for (const Step& step : steps) {
        if (!std::visit(runner, step)) throw std::bad_alloc();
    }
}

}  // namespace quantlib::cpu

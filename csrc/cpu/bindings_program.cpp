// Python's view of a Program: one method per kind of step; tensors cross as addresses.
#include "bindings_program.h"

#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "program.h"
#include "words.h"

namespace py = pybind11;

namespace quantlib::cpu {

namespace {

using ReadBy = std::pair<Product, Reads>;
constexpr std::pair<const char*, ReadBy> PRODUCTS[] = {{"linear", {&Kernels::linear, Reads::both}},
                                                       {"pairs_dot", {&Kernels::pairs_dot, Reads::rows}},
                                                       {"pairs_strip", {&Kernels::pairs_strip, Reads::strips}},
                                                       {"amx_strip", {&Kernels::amx_strip, Reads::strips}},
                                                       {"lookup_dot", {&Kernels::lookup_dot, Reads::rows}}};

const void* from(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* to(uintptr_t address) { return reinterpret_cast<void*>(address); }

// A weight, its bias and what becomes of it.
using Quantized = std::tuple<const Plan*, const Parts*, uintptr_t, uintptr_t>;
using Plain = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t>;  // and its n

// One row of x.
void product(Program& program, const std::string& kernel, const std::vector<Quantized>& weights, const std::string& dtype,
             uintptr_t x, bool gated, int threads) {
    const auto [function, reads] = parse(PRODUCTS, kernel);
    ProductStep step = {function, {}, gated};
    for (const auto& [plan, parts, bias, y] : weights) {
        check_layout(reads, *plan);
        if (function == Product(&Kernels::amx_strip)) check_bf16(parse(DTYPES, dtype));
        if (plan->strips != std::get<0>(weights[0])->strips) throw std::invalid_argument("weights of one step lie in two layouts");
        step.calls.push_back({plan, *parts, 1, parse(DTYPES, dtype), from(x), plan->k, 1, reinterpret_cast<const float*>(bias),
                              to(y), threads});
    }
    if (!weights.empty()) program.steps.push_back(step);
}

void dense(Program& program, const std::vector<Plain>& weights, const std::string& dtype, uintptr_t x, int64_t k,
           bool gated, int threads) {
    DenseStep step = {{}, gated};
    for (const auto& [weight, bias, y, n] : weights) {
        step.calls.push_back({parse(DTYPES, dtype), from(weight), from(x), from(bias), to(y), n, k, threads});
    }
    if (!weights.empty()) program.steps.push_back(step);
}

void rotate(Program& program, const std::string& dtype, uintptr_t x, uintptr_t cosine, uintptr_t sine, uintptr_t y,
            int64_t heads, int64_t width, bool cached) {
    const int64_t stride = cached ? program.capacity * width : width;
    program.steps.push_back(
        RotateStep{{parse(DTYPES, dtype), from(x), from(cosine), from(sine), to(y), stride, heads, width}, cached});
}

void attention(Program& program, const std::string& dtype, uintptr_t q, uintptr_t keys, uintptr_t values, uintptr_t y,
               int64_t heads, int64_t key_heads, int64_t width, float scale, int threads) {
    if (width % 16 != 0) throw std::invalid_argument("heads must be a multiple of 16 wide, found " + std::to_string(width));
    program.steps.push_back(AttentionStep{{parse(DTYPES, dtype), from(q), from(keys), from(values), to(y), heads, key_heads,
                                           width, program.capacity, 0, scale, threads}});
}

void run(bool done) {
    if (!done) throw std::bad_alloc();
}

using Strides = std::pair<int64_t, int64_t>;  // of positions and of heads, in elements

void prompt_attention(const std::string& dtype, uintptr_t q, const Strides& q_strides, uintptr_t keys, const Strides& key_strides,
                      uintptr_t values, const Strides& value_strides, uintptr_t y, int64_t m, int64_t start, int64_t heads,
                      int64_t key_heads, int64_t width, float scale, int threads) {
    const PromptAttentionCall call = {parse(DTYPES, dtype),
                                      from(q),
                                      q_strides.first,
                                      q_strides.second,
                                      from(keys),
                                      key_strides.first,
                                      key_strides.second,
                                      from(values),
                                      value_strides.first,
                                      value_strides.second,
                                      to(y),
                                      m,
                                      start,
                                      heads,
                                      key_heads,
                                      width,
                                      scale,
                                      threads};
    py::gil_scoped_release release;
    run(kernels().prompt_attention(call));
}

void prompt_norm(const std::string& dtype, uintptr_t x, uintptr_t weight, uintptr_t y, int64_t rows, int64_t width, float epsilon,
                 int threads) {
    const NormCall call = {parse(DTYPES, dtype), from(x), from(weight), to(y), rows, width, epsilon};
    py::gil_scoped_release release;
    run(kernels().prompt_norm(call, threads));
}

void prompt_gate(const std::string& dtype, uintptr_t gate, uintptr_t up, uintptr_t y, int64_t count, int threads) {
    const GateCall call = {parse(DTYPES, dtype), from(gate), from(up), to(y), count};
    py::gil_scoped_release release;
    run(kernels().prompt_gate(call, threads));
}

void prompt_rotate(const std::string& dtype, uintptr_t x, uintptr_t cosine, uintptr_t sine, uintptr_t y, const Strides& y_strides,
                   int64_t positions, int64_t heads, int64_t width, int threads) {
    const RotateCall first = {parse(DTYPES, dtype), from(x), from(cosine), from(sine), to(y), y_strides.second, heads, width};
    py::gil_scoped_release release;
    run(kernels().prompt_rotate({first, positions, y_strides.first}, threads));
}

}  // namespace

void bind_program(py::module_& module) {
    py::class_<Program>(module, "Program", "The forward pass of one token, step by step; addresses of tensors kept elsewhere.")
        .def(py::init([](int64_t capacity) { return Program{capacity, {}}; }), py::arg("capacity"))
        .def("embed", [](Program& program, uintptr_t table, uintptr_t y, int64_t rows, int64_t row_bytes) {
            program.steps.push_back(EmbedStep{from(table), to(y), rows, row_bytes});
        })
        // The plans' own addresses are kept, by the tuple that they come in.
        .def("product", &product, py::keep_alive<1, 3>())
        .def("dense", &dense)
        .def("norm", [](Program& program, const std::string& dtype, uintptr_t x, uintptr_t weight, uintptr_t y, int64_t rows,
                        int64_t width, float epsilon) {
            program.steps.push_back(NormCall{parse(DTYPES, dtype), from(x), from(weight), to(y), rows, width, epsilon});
        })
        .def("round", [](Program& program, const std::string& dtype, uintptr_t x, uintptr_t y, int64_t k) {
            program.steps.push_back(Int8RowsCall{1, k, parse(DTYPES, dtype), from(x), k, 1, nullptr, nullptr, to(y), 1});
        })
        .def("rotate", &rotate)
        .def("attention", &attention)
        .def("gate", [](Program& program, const std::string& dtype, uintptr_t gate, uintptr_t up, uintptr_t y, int64_t count) {
            program.steps.push_back(GateCall{parse(DTYPES, dtype), from(gate), from(up), to(y), count});
        })
        .def("add", [](Program& program, const std::string& dtype, uintptr_t x, uintptr_t y, int64_t count) {
            program.steps.push_back(AddCall{parse(DTYPES, dtype), from(x), to(y), count});
        })
        .def("run", &Program::run, py::arg("token"), py::arg("position"), py::call_guard<py::gil_scoped_release>());
    module.def("prompt_attention", &prompt_attention, py::arg("dtype"), py::arg("q"), py::arg("q_strides"), py::arg("keys"),
               py::arg("key_strides"), py::arg("values"), py::arg("value_strides"), py::arg("y"), py::arg("m"), py::arg("start"),
               py::arg("heads"), py::arg("key_heads"), py::arg("width"), py::arg("scale"), py::arg("threads"),
               "y[m, heads, width], contiguous = causal attention of m positions behind the first `start`; strides of positions and heads.");
    module.def("prompt_norm", &prompt_norm, py::arg("dtype"), py::arg("x"), py::arg("weight"), py::arg("y"), py::arg("rows"),
               py::arg("width"), py::arg("epsilon"), py::arg("threads"), "y = weight * x / sqrt(mean(x^2) + epsilon), row by row.");
    module.def("prompt_gate", &prompt_gate, py::arg("dtype"), py::arg("gate"), py::arg("up"), py::arg("y"), py::arg("count"),
               py::arg("threads"), "y = silu(gate) * up.");
    module.def("prompt_rotate", &prompt_rotate, py::arg("dtype"), py::arg("x"), py::arg("cosine"), py::arg("sine"), py::arg("y"),
               py::arg("y_strides"), py::arg("positions"), py::arg("heads"), py::arg("width"), py::arg("threads"),
               "x[positions, heads, width], rotated by cosine and sine [positions, width], or copied where they are 0; strides of "
               "positions and heads.");
    py::list products;
    for (const auto& entry : PRODUCTS) products.append(entry.first);
    module.attr("PRODUCTS") = py::tuple(products);
}

}  // namespace quantlib::cpu

// Python's view of a Program: one method per kind of step; tensors cross as addresses.
#include "bindings_program.h"

#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "program.h"
#include "words.h"

namespace py = pybind11;

namespace quantlib::cpu {

namespace {

constexpr std::pair<const char*, Product> PRODUCTS[] = {
    {"linear", &Kernels::linear},
    {"pairs_dot", &Kernels::pairs_dot},
    {"amx_dot", &Kernels::amx_dot},
    {"lookup_dot", &Kernels::lookup_dot}};

const void* from(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* to(uintptr_t address) { return reinterpret_cast<void*>(address); }

// A weight, its bias and what becomes of it.
using Quantized = std::tuple<const Plan*, const Parts*, uintptr_t, uintptr_t>;
using Plain = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t>;  // and its n

// One row of x.
void product(Program& program, const std::string& kernel, const std::vector<Quantized>& weights, const std::string& dtype,
             uintptr_t x, bool gated, int threads) {
    ProductStep step = {parse(PRODUCTS, kernel), {}, gated};
    for (const auto& [plan, parts, bias, y] : weights) {
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
    py::list products;
    for (const auto& entry : PRODUCTS) products.append(entry.first);
    module.attr("PRODUCTS") = py::tuple(products);
}

}  // namespace quantlib::cpu

// The Python face of the kernels that choose scales and codes. Callers (quantlib/kernels/cpu_quantize.py) check shapes and keep
// the tensors alive; words that name kinds are checked here.
#include "bindings_quantize.h"

#include <pybind11/stl.h>

#include <array>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "quantize_types.h"
#include "words.h"

namespace py = pybind11;

namespace quantlib::cpu {

namespace {

// "exact": a scale is kept as it is until all of them are stored.
constexpr std::pair<const char*, ScaleKind> SCALES[] = {{"float", ScaleKind::number},
                                                        {"e4m3_global", ScaleKind::e4m3_global},
                                                        {"e8m0", ScaleKind::e8m0},
                                                        {"exact", ScaleKind::super}};

// fp32, as addresses: scale, zero and minimum, 0 where there is none; vv, vw, ww, v, w, one.
using NumberAddresses = std::array<uintptr_t, 3>;
using MomentAddresses = std::array<uintptr_t, 6>;

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

Numbers make_numbers(const NumberAddresses& at) { return {floats(at[0]), floats(at[1]), floats(at[2])}; }

struct WeightArguments {
    uintptr_t data;
    std::string dtype;
    int64_t rows, row_stride;
};

Weight make_weight(const WeightArguments& a) {
    return {reinterpret_cast<const void*>(a.data), parse(DTYPES, a.dtype), a.rows, a.row_stride};
}

// {address of fp32, row stride}; an address of 0: none.
using ImportanceArguments = std::pair<uintptr_t, int64_t>;

Weight make_importance(const ImportanceArguments& a, int64_t rows) {
    return {reinterpret_cast<const void*>(a.first), DType::float32, rows, a.second};
}

bool done(Outcome outcome) {
    if (outcome == Outcome::no_memory) throw std::bad_alloc();
    return outcome == Outcome::done;
}

template <class T>
void copy(T (&to)[16], const std::vector<T>& from, const char* what) {
    if (from.size() != 16) throw std::invalid_argument(std::string(what) + ": 16 numbers are needed");
    for (int i = 0; i < 16; ++i) to[i] = from[i];
}

Coding make_coding(int64_t k, int64_t padded_k, int bits, int64_t block_rows, int64_t block_cols, int64_t blocks_across,
                   bool reciprocal, bool has_zero, bool has_minimum, const std::string& scale,
                   const std::string& scale_dtype) {
    if (bits < 1 || bits > 8) throw std::invalid_argument("bits must lie in 1..8, found " + std::to_string(bits));
    if (k < 1 || padded_k < k || block_rows < 0 || block_cols < 0 || block_cols % 8 != 0) {
        throw std::invalid_argument("impossible k, padded_k or block");
    }
    if (blocks_across * (block_cols == 0 ? padded_k : block_cols) != padded_k) {
        throw std::invalid_argument("the blocks of a row must fill its padded columns");
    }
    Coding coding = {};
    coding.k = k, coding.padded_k = padded_k, coding.bits = bits;
    coding.block_rows = block_rows, coding.block_cols = block_cols, coding.blocks_across = blocks_across;
    coding.piece = block_cols % 32 == 0 ? 32 : block_cols % 16 == 0 ? 16 : 8;
    coding.reciprocal = reciprocal, coding.has_zero = has_zero, coding.has_minimum = has_minimum;
    coding.scale = parse(SCALES, scale);
    coding.scale_dtype = parse(DTYPES, scale_dtype);
    return coding;
}

void check_lanes(const Coding& coding) {
    const int64_t size = coding.block_cols == 0 ? coding.padded_k : coding.block_cols;
    if (coding.block_rows != 1 || size < 8 || (size & (size - 1)) != 0) {
        throw std::invalid_argument("sums need blocks of one row and of a power of two of columns, at least 8");
    }
}

bool extremes(const Coding& coding, const WeightArguments& weight, uintptr_t low, uintptr_t high, int threads) {
    const ExtremesCall call = {&coding, make_weight(weight), floats(low), floats(high), threads};
    const Kernels& chosen = kernels();
    py::gil_scoped_release release;
    return done(chosen.extremes(call));
}

bool encode(const Coding& coding, const WeightArguments& weight, const NumberAddresses& numbers, uintptr_t codes, int threads) {
    const EncodeCall call = {&coding, make_weight(weight), make_numbers(numbers), reinterpret_cast<uint8_t*>(codes), threads};
    const Kernels& chosen = kernels();
    py::gil_scoped_release release;
    return done(chosen.encode(call));
}

void sums(const Coding& coding, const WeightArguments& weight, const ImportanceArguments& importance,
          const NumberAddresses& numbers, uintptr_t error, const MomentAddresses& moments, int threads) {
    check_lanes(coding);
    const Moments at = {floats(moments[0]), floats(moments[1]), floats(moments[2]),
                        floats(moments[3]), floats(moments[4]), floats(moments[5])};
    const SumsCall call = {
        &coding, make_weight(weight), make_importance(importance, weight.rows), make_numbers(numbers), floats(error), at, threads};
    const Kernels& chosen = kernels();
    py::gil_scoped_release release;
    done(chosen.sums(call));
}

void search(const Coding& coding, const WeightArguments& weight, const ImportanceArguments& importance,
            const std::vector<NumberAddresses>& candidates, int steps, float global_scale, const NumberAddresses& result, int threads) {
    check_lanes(coding);
    if (candidates.empty()) throw std::invalid_argument("a search needs a candidate to start from");
    std::vector<Numbers> fits;
    for (const NumberAddresses& each : candidates) fits.push_back(make_numbers(each));
    const SearchCall call = {&coding,
                             make_weight(weight),
                             make_importance(importance, weight.rows),
                             fits.data(),
                             int64_t(fits.size()),
                             steps,
                             global_scale,
                             floats(result[0]),
                             floats(result[1]),
                             floats(result[2]),
                             threads};
    const Kernels& chosen = kernels();
    py::gil_scoped_release release;
    done(chosen.search(call));
}

}  // namespace

void bind_quantize(py::module_& module) {
    py::class_<Coding>(module, "Coding", "Everything about a weight's codes except its values and where they lie.")
        .def(py::init(&make_coding), py::kw_only(), py::arg("k"), py::arg("padded_k"), py::arg("bits"), py::arg("block_rows"),
             py::arg("block_cols"), py::arg("blocks_across"), py::arg("reciprocal"), py::arg("has_zero"),
             py::arg("has_minimum"), py::arg("scale"), py::arg("scale_dtype"))
        .def(
            "affine",
            [](Coding& self, float offset) { self.rounding = RoundingKind::affine, self.offset = offset; },
            py::arg("offset"), "Codes are integers: value = code - offset.")
        .def(
            "table",
            [](Coding& self, const std::vector<float>& bounds, const std::vector<float>& ranked,
               const std::vector<int32_t>& order) {
                self.rounding = RoundingKind::table;
                copy(self.bounds, bounds, "bounds"), copy(self.ranked, ranked, "ranked"), copy(self.order, order, "order");
            },
            py::arg("bounds"), py::arg("ranked"), py::arg("order"), "Codes are entries of a book of up to 16 values.")
        .def(
            "minifloat",
            [](Coding& self, int mantissa_bits, float smallest, float largest, bool signed_zero) {
                self.rounding = RoundingKind::minifloat, self.mantissa_bits = mantissa_bits;
                self.smallest = smallest, self.largest = largest, self.signed_zero = signed_zero;
            },
            py::arg("mantissa_bits"), py::arg("smallest"), py::arg("largest"), py::arg("signed_zero"),
            "Codes are small floats: the least normal value, the largest value.");

    py::class_<WeightArguments>(module, "Weight", "A weight with contiguous columns: address, dtype, rows, row stride.")
        .def(py::init<uintptr_t, std::string, int64_t, int64_t>(), py::arg("data"), py::arg("dtype"), py::arg("rows"),
             py::arg("row_stride"));

    module.def("extremes", &extremes, py::arg("coding"), py::arg("weight"), py::arg("low"), py::arg("high"),
               py::arg("threads"),
               "low, high fp32 [rows, blocks_across]: extremes of every block of every row. False: the weight is not finite.");
    module.def("encode", &encode, py::arg("coding"), py::arg("weight"), py::arg("numbers"), py::arg("codes"),
               py::arg("threads"), "Packed codes under (scale, zero, minimum). False: something is not finite.");
    module.def("sums", &sums, py::arg("coding"), py::arg("weight"), py::arg("importance"), py::arg("numbers"), py::arg("error"),
               py::arg("moments"), py::arg("threads"),
               "The (weighted) squared error of every block, and its moments (vv, vw, ww, v, w, one); 0: not wanted.");
    module.def("search", &search, py::arg("coding"), py::arg("weight"), py::arg("importance"), py::arg("candidates"),
               py::arg("steps"), py::arg("global_scale"), py::arg("result"), py::arg("threads"),
               "Of the candidates (scale, zero, minimum) and `steps` further solutions the best of every block.");
}

}  // namespace quantlib::cpu

// The Python face of the CPU kernels. Tensors cross as addresses, shapes and strides, so that one build serves every torch.
// Callers (quantlib/kernels/cpu.py) check shapes and keep the tensors alive; words that name kinds are checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings_program.h"
#include "bindings_quantize.h"
#include "dispatch.h"
#include "program.h"
#include "types.h"
#include "words.h"

namespace py = pybind11;
using namespace quantlib::cpu;

namespace {

// The words that cross the border, each written once; those of dtypes in words.h.
constexpr std::pair<const char*, CodecKind> CODECS[] = {
    {"table", CodecKind::table}, {"affine", CodecKind::affine}, {"e4m3", CodecKind::e4m3}, {"e5m2", CodecKind::e5m2}};
constexpr std::pair<const char*, ScaleKind> SCALES[] = {{"float", ScaleKind::number},
                                                        {"e4m3_global", ScaleKind::e4m3_global},
                                                        {"e8m0", ScaleKind::e8m0},
                                                        {"double", ScaleKind::double_quant},
                                                        {"super", ScaleKind::super}};

template <class Kind, size_t COUNT>
std::vector<std::string> names(const std::pair<const char*, Kind> (&words)[COUNT]) {
    std::vector<std::string> all;
    for (const auto& each : words) all.emplace_back(each.first);
    return all;
}

void fill(float (&table)[256], const std::vector<float>& values, const char* what) {
    if (values.empty() || 256 % values.size() != 0) {
        throw std::invalid_argument(std::string(what) + ": the number of values must be a power of two up to 256");
    }
    for (size_t i = 0; i < 256; ++i) table[i] = values[i % values.size()];
}

uint16_t rounded_to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return uint16_t(bits >> 16 | 0x0040u);
    return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// The widest run of columns, up to `most`, of which a block holds a whole number.
int piece_of(int64_t block_cols, int most) {
    for (int piece = most; piece >= 8; piece /= 2) {
        if (block_cols % piece == 0) return piece;
    }
    throw std::invalid_argument("a block must span a multiple of 8 columns, found " + std::to_string(block_cols));
}

struct PlanArguments {
    int64_t n, k, padded_k;
    int bits;
    std::string codec;
    float offset;
    std::vector<float> values;
    int64_t block_rows, block_cols, blocks_across;
    std::string scale, scale_dtype;
    int super_bits, super_count;
    float super_offset;
    std::vector<float> scale_values;
    bool has_zero, has_minimum, strips;
};

Plan make_plan(const PlanArguments& a) {
    if (a.bits < 1 || a.bits > 8) throw std::invalid_argument("bits must lie in 1..8, found " + std::to_string(a.bits));
    if (a.n < 0 || a.k < 0 || a.padded_k < a.k) throw std::invalid_argument("impossible n, k or padded_k");
    Plan plan = {};
    plan.n = a.n, plan.k = a.k, plan.padded_k = a.padded_k, plan.bits = a.bits;
    plan.codec = parse(CODECS, a.codec);
    if ((plan.codec == CodecKind::e4m3 || plan.codec == CodecKind::e5m2) && a.bits != 8) {
        throw std::invalid_argument(a.codec + " has 8 bits, found " + std::to_string(a.bits));
    }
    if (a.values.size() != size_t(1) << a.bits) throw std::invalid_argument("values must hold one number per code");
    plan.offset = a.offset;
    fill(plan.values, a.values, "values");
    for (size_t i = 0; i < 256; ++i) plan.pairs[i] = rounded_to_bfloat(plan.values[i]);
    plan.block_rows = a.block_rows, plan.block_cols = a.block_cols, plan.blocks_across = a.blocks_across;
    plan.piece = piece_of(a.block_cols, 32);
    plan.span_piece = piece_of(a.block_cols, 128);
    plan.scale = parse(SCALES, a.scale);
    plan.scale_dtype = parse(DTYPES, a.scale_dtype);
    plan.super_bits = a.super_bits, plan.super_count = a.super_count, plan.super_offset = a.super_offset;
    if (plan.scale == ScaleKind::super && (a.super_count < 1 || a.super_bits < 1 || a.super_bits > 8)) {
        throw std::invalid_argument("super scales need 1..8 bits and a positive count");
    }
    plan.supers_across = plan.scale == ScaleKind::super ? a.blocks_across / a.super_count : 0;
    if (plan.scale == ScaleKind::double_quant) fill(plan.scale_values, a.scale_values, "scale_values");
    plan.has_zero = a.has_zero, plan.has_minimum = a.has_minimum, plan.strips = a.strips;
    if (plan.strips) check_words("strips take", plan);
    return plan;
}

template <class T>
const T* address(const py::dict& parts, const char* name, bool needed) {
    if (!parts.contains(name)) {
        if (needed) throw std::invalid_argument(std::string("part ") + name + " is missing");
        return nullptr;
    }
    return reinterpret_cast<const T*>(parts[name].cast<uintptr_t>());
}

Parts make_parts(const Plan& plan, const py::dict& parts) {
    const bool super = plan.scale == ScaleKind::super, twice = plan.scale == ScaleKind::double_quant;
    return {address<uint8_t>(parts, "codes", true),
            address<uint8_t>(parts, "scales", true),
            address<uint8_t>(parts, "minima", plan.has_minimum),
            address<uint8_t>(parts, "zeros", plan.has_zero),
            address<float>(parts, "global_scale", plan.scale == ScaleKind::e4m3_global),
            address<float>(parts, "scale_absmax", twice),
            address<float>(parts, "scale_offset", twice),
            address<uint8_t>(parts, "super_scales", super),
            address<uint8_t>(parts, "super_minima", super && plan.has_minimum)};
}

constexpr char PAIRS[] = "products of bf16 pairs", TILES[] = "tile registers", LOOKUPS[] = "look-ups";

bool run(bool (*kernel)(const LinearCall&), const LinearCall& call) { return kernel(call); }
bool run(bool (*kernel)(const Joined<LinearCall>&), const LinearCall& call) { return kernel({&call, 1, false}); }

template <auto KERNEL, const char* WHAT, Reads READS>
void linear(const Plan& plan, const Parts& parts, int64_t m, const std::string& dtype, uintptr_t x, int64_t x_row_stride,
            int64_t x_column_stride, uintptr_t bias, uintptr_t y, int threads) {
    const LinearCall call = {&plan,         parts,
                             m,             parse(DTYPES, dtype),
                             reinterpret_cast<const void*>(x),
                             x_row_stride,  x_column_stride,
                             reinterpret_cast<const float*>(bias),
                             reinterpret_cast<void*>(y),
                             threads};
    const auto chosen = kernels().*KERNEL;
    if (chosen == nullptr) throw std::invalid_argument("the instruction set " + isa() + " has no " + WHAT);
    check_layout(READS, plan);
    if constexpr (WHAT == TILES) check_bf16(call.dtype);
    py::gil_scoped_release release;
    if (!run(chosen, call)) throw std::bad_alloc();
}

void rows_to_int8(int64_t m, int64_t k, const std::string& dtype, uintptr_t x, int64_t x_row_stride, int64_t x_column_stride,
               uintptr_t codes, uintptr_t scales, uintptr_t rounded, int threads) {
    const Int8RowsCall call = {m,
                               k,
                               parse(DTYPES, dtype),
                               reinterpret_cast<const void*>(x),
                               x_row_stride,
                               x_column_stride,
                               reinterpret_cast<uint8_t*>(codes),
                               reinterpret_cast<float*>(scales),
                               reinterpret_cast<void*>(rounded),
                               threads};
    const auto chosen = kernels().rows_to_int8;
    py::gil_scoped_release release;
    if (!chosen(call)) throw std::bad_alloc();
}

void int8_tile(const Plan& plan, const Parts& parts, int64_t m, const std::string& dtype, uintptr_t x, uintptr_t x_scales, float unit,
               uintptr_t bias, uintptr_t y, int threads) {
    const LinearCall linear = {&plan, parts, m, parse(DTYPES, dtype), reinterpret_cast<const void*>(x), plan.k, 1,
                               reinterpret_cast<const float*>(bias), reinterpret_cast<void*>(y), threads};
    const auto chosen = kernels().int8_tile;
    if (chosen == nullptr) throw std::invalid_argument("the instruction set " + isa() + " has no products of bytes");
    py::gil_scoped_release release;
    if (!chosen({linear, reinterpret_cast<const float*>(x_scales), unit})) throw std::bad_alloc();
}

using Range = std::pair<int64_t, int64_t>;

void dequantize(const Plan& plan, const Parts& parts, const Range& rows, const Range& columns, const std::string& dtype,
                uintptr_t out, int threads) {
    if (rows.first < 0 || rows.second < rows.first || rows.second > plan.n) throw std::invalid_argument("rows out of range");
    if (columns.first < 0 || columns.second < columns.first || columns.second > plan.k || columns.first % 32 != 0) {
        throw std::invalid_argument("columns out of range, or not starting at a multiple of 32");
    }
    const DequantizeCall call = {&plan,         parts,          rows.first,
                                 rows.second,   columns.first,           columns.second,
                                 parse(DTYPES, dtype), reinterpret_cast<void*>(out), threads};
    const Kernels& chosen = kernels();
    py::gil_scoped_release release;
    if (!chosen.dequantize(call)) throw std::bad_alloc();
}

py::dict build_info() {
    py::dict info;
    info["isas"] = available_isas();
    info["isa"] = isa();
    info["compiler"] = QUANTLIB_COMPILER;
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
    return info;
}

// How an instruction set is chosen, as functions of features: for tests, which can't have every machine.
void bind_features(py::module_& module) {
    using Names = std::vector<std::string>;
    module.attr("FEATURES") = py::cast(feature_names());
    module.def("features", [] { return feature_names(machine_features()); }, "What this machine has of FEATURES.");
    module.def(
        "features_of",
        [](uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t leaf7_ecx, uint32_t leaf7_edx, uint32_t leaf7_1_eax, uint32_t xcr0) {
            return feature_names(features_of({leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf7_1_eax, xcr0}));
        },
        py::kw_only(), py::arg("leaf1_ecx"), py::arg("leaf7_ebx"), py::arg("leaf7_ecx"), py::arg("leaf7_edx"),
        py::arg("leaf7_1_eax"), py::arg("xcr0"), "What CPUID and XGETBV say in words of FEATURES.");
    module.def("needs_of", [](const std::string& name) { return feature_names(needs_of(name)); }, py::arg("isa"),
               "The features that an instruction set needs.");
    module.def("isas_for", [](const Names& features) { return isas_for(features_named(features)); }, py::arg("features"),
               "The sets of this build that a machine with these features runs, slowest first.");
    module.def(
        "isa_for", [](const Names& features, const std::string& limit) { return isa_for(features_named(features), limit); },
        py::arg("features"), py::arg("limit"), "The set that it starts with where QUANTLIB_CPU_ISA is `limit`, or empty.");
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "CPU kernels of quantlib: packed weights of the layouts rows and cpu_rows";
    choose_isa();

    py::class_<Plan>(module, "Plan", "Everything about a weight of one format and shape except where its bytes lie.")
        .def(py::init([](int64_t n, int64_t k, int64_t padded_k, int bits, const std::string& codec, float offset,
                         const std::vector<float>& values, int64_t block_rows, int64_t block_cols, int64_t blocks_across,
                         const std::string& scale, const std::string& scale_dtype, int super_bits, int super_count,
                         float super_offset, const std::vector<float>& scale_values, bool has_zero, bool has_minimum, bool strips) {
                 return make_plan({n, k, padded_k, bits, codec, offset, values, block_rows, block_cols, blocks_across, scale,
                                   scale_dtype, super_bits, super_count, super_offset, scale_values, has_zero, has_minimum, strips});
             }),
             py::kw_only(), py::arg("n"), py::arg("k"), py::arg("padded_k"), py::arg("bits"), py::arg("codec"),
             py::arg("offset"), py::arg("values"), py::arg("block_rows"), py::arg("block_cols"), py::arg("blocks_across"),
             py::arg("scale"), py::arg("scale_dtype"), py::arg("super_bits"), py::arg("super_count"),
             py::arg("super_offset"), py::arg("scale_values"), py::arg("has_zero"), py::arg("has_minimum"), py::arg("strips"));

    py::class_<Parts>(module, "Parts", "Where the bytes of a weight lie: addresses by the names of its parts.")
        .def(py::init([](const Plan& plan, const py::dict& parts) { return make_parts(plan, parts); }), py::arg("plan"),
             py::arg("addresses"));

    const auto define_product = [&](const char* name, auto function, const char* text) {
        module.def(name, function, py::arg("plan"), py::arg("parts"), py::arg("m"), py::arg("dtype"), py::arg("x"),
                   py::arg("x_row_stride"), py::arg("x_column_stride"), py::arg("bias"), py::arg("y"), py::arg("threads"), text);
    };
    define_product("linear", &linear<&Kernels::linear, PAIRS, Reads::both>,
                   "y[m, n] = x[m, k] W^T + bias; addresses of x, bias (fp32, or 0) and y, the latter contiguous.");
    define_product("pairs_dot", &linear<&Kernels::pairs_dot, PAIRS, Reads::rows>, "The same with codes of 2 to 6 or 8 bits as bf16 numbers.");
    define_product("pairs_strip", &linear<&Kernels::pairs_strip, PAIRS, Reads::strips>, "As pairs_dot, of a plan with strips.");
    define_product("pairs_strip_tile", &linear<&Kernels::pairs_strip_tile, PAIRS, Reads::strips>, "As pairs_tile, of a plan with strips.");
    define_product("pairs_tile", &linear<&Kernels::pairs_tile, PAIRS, Reads::both>, "The same for bf16 x, with weights rounded to bf16.");
    define_product("pairs_dgrad", &linear<&Kernels::pairs_dgrad, PAIRS, Reads::both>, "y[m, k] = x[m, n] W in bf16, without a bias.");
    define_product("amx_strip", &linear<&Kernels::amx_strip, TILES, Reads::strips>, "As pairs_strip for bf16 x, in tile registers.");
    define_product("amx_linear", &linear<&Kernels::amx_linear, TILES, Reads::words>, "As pairs_tile, in tile registers.");
    define_product("amx_dgrad", &linear<&Kernels::amx_dgrad, TILES, Reads::words>, "As pairs_dgrad, in tile registers.");
    define_product("lookup_dot", &linear<&Kernels::lookup_dot, LOOKUPS, Reads::rows>, "The same by byte look-ups, for few rows of x.");
    define_product("lookup_tile", &linear<&Kernels::lookup_tile, LOOKUPS, Reads::rows>, "The same for several rows of x, with weights decoded in fp32.");
    module.def("rows_to_int8", &rows_to_int8, py::arg("m"), py::arg("k"), py::arg("dtype"), py::arg("x"), py::arg("x_row_stride"),
               py::arg("x_column_stride"), py::arg("codes"), py::arg("scales"), py::arg("rounded"), py::arg("threads"),
               "x[m, k] -> bytes[m, k], fp32[m] and what they stand for in x's dtype, at those addresses, each of which may be 0; as the "
               "format int8 does, but a row that isn't finite gets the scale NaN.");
    module.def("int8_tile", &int8_tile, py::arg("plan"), py::arg("parts"), py::arg("m"), py::arg("dtype"), py::arg("x"),
               py::arg("x_scales"), py::arg("unit"), py::arg("bias"), py::arg("y"), py::arg("threads"),
               "y[m, n] = (x - 128) * x_scales[m] W^T + bias for bytes x[m, k], contiguous; `dtype` is y's, `unit` divides every value "
               "of W's codec.");
    module.def("dequantize", &dequantize, py::arg("plan"), py::arg("parts"), py::arg("rows"), py::arg("columns"),
               py::arg("dtype"), py::arg("out"), py::arg("threads"),
               "W[rows, columns], two (start, stop), in `dtype` at the address `out`, contiguous.");
    module.def("has_pairs", [] { return kernels().pairs_dot != nullptr; }, "Whether the set that runs multiplies bf16 pairs.");
    module.def("has_tiles", [] { return kernels().amx_linear != nullptr; }, "Whether the set that runs has tile registers.");
    module.def("has_int8", [] { return kernels().int8_tile != nullptr; }, "Whether the set that runs multiplies bytes.");
    module.def("has_lookup", [] { return kernels().lookup_dot != nullptr; }, "Whether the set that runs has byte look-ups.");
    module.def("isa", &isa, "The instruction set that runs.");
    module.def("available_isas", &available_isas, "The sets that this build and this machine have, slowest first.");
    bind_features(module);
    module.def("set_isa", &set_isa, py::arg("name"), "Choose an available set (for tests and comparisons).");
    module.def("build_info", &build_info, "What was built: isas, isa, compiler, openmp, pybind11.");
    bind_quantize(module);
    bind_program(module);
    module.attr("DTYPES") = py::cast(names(DTYPES));
    module.attr("CODECS") = py::cast(names(CODECS));
    module.attr("SCALES") = py::cast(names(SCALES));
}

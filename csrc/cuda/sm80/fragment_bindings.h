// The Python face of the fragments kernels, for quantlib._cuda and for the emulator's module alike.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "variants.h"

namespace quantlib::cuda {

template <class Kind, size_t COUNT>
Kind parse_kind(const std::pair<const char*, Kind> (&words)[COUNT], const std::string& word) {
    std::string known;
    for (const auto& [name, kind] : words) {
        if (word == name) return kind;
        known += (known.empty() ? "" : ", ") + std::string(name);
    }
    throw std::invalid_argument("unknown kind " + word + ": expected one of " + known);
}

constexpr std::pair<const char*, ScaleDType> SCALE_DTYPES[] = {{"float16", ScaleDType::fp16},
                                                               {"bfloat16", ScaleDType::bf16},
                                                               {"float32", ScaleDType::fp32},
                                                               {"e8m0", ScaleDType::e8m0},
                                                               {"byte", ScaleDType::byte}};
constexpr std::pair<const char*, ScaleHome> SCALE_HOMES[] = {
    {"strip", ScaleHome::strip}, {"row", ScaleHome::row}, {"tensor", ScaleHome::tensor}, {"grid", ScaleHome::grid}};

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline FragmentWeight make_weight(const std::vector<uintptr_t>& planes, uintptr_t scales, uintptr_t zeros, uintptr_t outer,
                                  uintptr_t inner, uintptr_t scale_map, uintptr_t table, int n, int k, int tiles, int tile_columns,
                                  int group, int block_rows, int across, int unit_columns, int units, int offset,
                                  const std::string& scale_dtype, const std::string& scale_home) {
    if (planes.empty() || planes.size() > 3) throw std::invalid_argument("a weight has one to three code planes");
    FragmentWeight weight = {};
    for (size_t i = 0; i < planes.size(); ++i) weight.planes[i] = at<std::byte>(planes[i]);
    weight.scales = at<std::byte>(scales), weight.zeros = at<std::byte>(zeros);
    weight.absmax = at<float>(outer), weight.absmax_offset = at<float>(inner), weight.scale_map = at<float>(scale_map);
    weight.table = at<float>(table);
    weight.n = n, weight.k = k, weight.tiles = tiles, weight.tile_columns = tile_columns;
    weight.group = group, weight.block_rows = block_rows, weight.across = across;
    weight.unit_columns = unit_columns, weight.units = units, weight.offset = offset;
    weight.scale_dtype = parse_kind(SCALE_DTYPES, scale_dtype), weight.scale_home = parse_kind(SCALE_HOMES, scale_home);
    return weight;
}

inline Schedule make_schedule(int blocks, int turns, int64_t each, uintptr_t partial, uintptr_t counters) {
    return {blocks, turns, each, at<float>(partial), at<int>(counters)};
}

template <class Arguments>
pybind11::list facts_of(const std::vector<Variant<Arguments>>& variants) {
    pybind11::list found;
    for (const auto& each : variants) {
        pybind11::dict facts;
        facts["codec"] = each.codec, facts["scaling"] = each.scaling, facts["dtype"] = each.dtype;
        facts["rows"] = each.rows, facts["columns"] = each.columns, facts["depth"] = each.depth;
        facts["threads"] = each.threads, facts["shared_bytes"] = each.shared_bytes;
        found.append(facts);
    }
    return found;
}

// `name` and `name`_variants: a kernel's launcher and its instances.
inline void bind_linear(pybind11::module_& module, const std::string& name, const std::vector<LinearVariant>& variants) {
    namespace py = pybind11;
    module.def((name + "_variants").c_str(), [variants] { return facts_of(variants); });
    module.def(
        name.c_str(),
        [variants](size_t variant, const FragmentWeight& weight, uintptr_t x, int64_t x_stride, uintptr_t y, uintptr_t bias,
                   uintptr_t residual, int m, const Schedule& schedule, int programs, uintptr_t stream) {
            const LinearArguments args = {weight, at<std::byte>(x), at<std::byte>(y), at<std::byte>(bias), at<std::byte>(residual),
                                          m,      x_stride,         schedule};
            variants.at(variant).launch(args, programs, at<void>(stream));
        },
        py::arg("variant"), py::arg("weight"), py::arg("x"), py::arg("x_stride"), py::arg("y"), py::arg("bias"),
        py::arg("residual"), py::arg("m"), py::arg("schedule"), py::arg("programs"), py::arg("stream"));
}

inline void bind_dgrad(pybind11::module_& module, const std::string& name, const std::vector<DgradVariant>& variants) {
    namespace py = pybind11;
    module.def((name + "_variants").c_str(), [variants] { return facts_of(variants); });
    module.def(
        name.c_str(),
        [variants](size_t variant, const FragmentWeight& weight, uintptr_t dy, int64_t dy_stride, uintptr_t dx, int m,
                   const Schedule& schedule, int programs, uintptr_t stream) {
            const DgradArguments args = {weight, at<std::byte>(dy), at<std::byte>(dx), m, dy_stride, schedule};
            variants.at(variant).launch(args, programs, at<void>(stream));
        },
        py::arg("variant"), py::arg("weight"), py::arg("dy"), py::arg("dy_stride"), py::arg("dx"), py::arg("m"),
        py::arg("schedule"), py::arg("programs"), py::arg("stream"));
}

inline void bind_fragments(pybind11::module_& module, const Instances& instances) {
    namespace py = pybind11;
    py::class_<FragmentWeight>(module, "FragmentWeight", py::module_local())
        .def(py::init(&make_weight), py::kw_only(), py::arg("planes"), py::arg("scales"), py::arg("zeros"), py::arg("outer"),
             py::arg("inner"), py::arg("scale_map"), py::arg("table"), py::arg("n"), py::arg("k"), py::arg("tiles"),
             py::arg("tile_columns"), py::arg("group"), py::arg("block_rows"), py::arg("across"), py::arg("unit_columns"),
             py::arg("units"), py::arg("offset"), py::arg("scale_dtype"), py::arg("scale_home"));
    py::class_<Schedule>(module, "Schedule", py::module_local())
        .def(py::init(&make_schedule), py::arg("blocks"), py::arg("turns"), py::arg("each"), py::arg("partial"),
             py::arg("counters"));
    bind_linear(module, "sm80_gemv", instances.gemv);
    bind_linear(module, "sm80_linear_frag", instances.linear);
    bind_dgrad(module, "sm80_dgrad_frag", instances.dgrad);
}

}  // namespace quantlib::cuda

// The Python face of scaled_fp8, for quantlib._cuda and for the emulator's module alike. Schedule is bound by
// sm80/fragment_bindings.h.
#pragma once

#include <pybind11/pybind11.h>

#include "scaled_fp8_variants.h"

namespace quantlib::cuda {

inline Fp8Operand make_fp8_operand(uintptr_t codes, int columns, uintptr_t scales, int64_t pitch, bool stepped) {
    return {reinterpret_cast<const std::byte*>(codes), columns, reinterpret_cast<const float*>(scales), pitch, stepped};
}

// sm90_scaled_fp8 and its instances.
inline void bind_scaled_fp8(pybind11::module_& module, const std::vector<ScaledFp8Variant>& variants) {
    namespace py = pybind11;
    py::class_<Fp8Operand>(module, "Fp8Operand", py::module_local())
        .def(py::init(&make_fp8_operand), py::arg("codes"), py::arg("columns"), py::arg("scales"), py::arg("pitch"),
             py::arg("stepped"));
    module.def("sm90_scaled_fp8_variants", [variants] {
        py::list found;
        for (const ScaledFp8Variant& each : variants) {
            py::dict facts;
            facts["codec"] = "e4m3", facts["scaling"] = each.scaling, facts["dtype"] = "float8_e4m3fn";
            facts["rows"] = each.rows, facts["columns"] = each.columns, facts["depth"] = each.depth;
            facts["threads"] = each.threads, facts["shared_bytes"] = each.shared_bytes;
            found.append(facts);
        }
        return found;
    });
    module.def(
        "sm90_scaled_fp8",
        [variants](size_t variant, const Fp8Operand& x, const Fp8Operand& w, uintptr_t y, uintptr_t bias,
                   const std::string& result, int m, int n, int k, const Schedule& schedule, int programs, uintptr_t stream) {
            const auto bytes = [](uintptr_t address) { return reinterpret_cast<std::byte*>(address); };
            const ScaledFp8Problem problem = {x, w, bytes(y), bytes(bias), result, m, n, k, schedule};
            variants.at(variant).launch(problem, programs, reinterpret_cast<void*>(stream));
        },
        py::arg("variant"), py::arg("x"), py::arg("w"), py::arg("y"), py::arg("bias"), py::arg("result"), py::arg("m"),
        py::arg("n"), py::arg("k"), py::arg("schedule"), py::arg("programs"), py::arg("stream"));
}

}  // namespace quantlib::cuda

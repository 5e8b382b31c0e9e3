// The Python face of linear_tile, for quantlib._cuda and for the emulator's module alike. FragmentWeight and Schedule are bound
// by sm80/fragment_bindings.h.
#pragma once

#include <pybind11/pybind11.h>

#include "tile_variants.h"

namespace quantlib::cuda {

// sm90_linear_tile and its instances.
inline void bind_tile(pybind11::module_& module, const std::vector<TileVariant>& variants) {
    namespace py = pybind11;
    module.def("sm90_linear_tile_variants", [variants] {
        py::list found;
        for (const TileVariant& each : variants) {
            py::dict facts;
            facts["codec"] = each.codec, facts["scaling"] = each.scaling, facts["dtype"] = each.dtype;
            facts["piece"] = each.piece;
            facts["rows"] = each.rows, facts["columns"] = each.columns, facts["depth"] = each.depth;
            facts["threads"] = each.threads, facts["shared_bytes"] = each.shared_bytes;
            facts["per_unit"] = each.per_unit;
            found.append(facts);
        }
        return found;
    });
    module.def(
        "sm90_linear_tile",
        [variants](size_t variant, const FragmentWeight& weight, uintptr_t x, int64_t x_stride, uintptr_t y, uintptr_t bias,
                   uintptr_t residual, int m, const Schedule& schedule, int programs, uintptr_t stream) {
            const auto bytes = [](uintptr_t address) { return reinterpret_cast<std::byte*>(address); };
            const LinearArguments args = {weight, bytes(x), bytes(y), bytes(bias), bytes(residual), m, x_stride, schedule};
            variants.at(variant).launch(args, programs, reinterpret_cast<void*>(stream));
        },
        py::arg("variant"), py::arg("weight"), py::arg("x"), py::arg("x_stride"), py::arg("y"), py::arg("bias"),
        py::arg("residual"), py::arg("m"), py::arg("schedule"), py::arg("programs"), py::arg("stream"));
}

}  // namespace quantlib::cuda

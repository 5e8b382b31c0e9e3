// What every Python module of emulated kernels offers beside its launchers; memory.py wraps it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt.h"

namespace simt {

inline pybind11::dict traffic_dict(const Traffic (&traffic)[std::size(ACCESS_NAMES)]) {
    pybind11::dict words;
    for (size_t i = 0; i < std::size(ACCESS_NAMES); ++i) {
        pybind11::dict numbers;
        numbers["accesses"] = traffic[i].accesses;
        numbers["wavefronts"] = traffic[i].wavefronts;
        numbers["conflicts"] = traffic[i].conflicts;
        words[ACCESS_NAMES[i]] = numbers;
    }
    return words;
}

inline pybind11::dict counters() {
    pybind11::dict words;
    words["all"] = traffic_dict(measured.all);
    words["steady"] = traffic_dict(measured.steady);
    words["uncounted"] = measured.uncounted;
    words["operations"] = measured.operations;
    return words;
}

inline void set_order_by_name(const std::string& name, uint64_t seed) {
    if (name != "forward" && name != "reverse" && name != "random") throw std::invalid_argument("unknown order " + name);
    set_order(name == "forward" ? Order::forward : name == "reverse" ? Order::reverse : Order::random, seed);
}

// Call it first in PYBIND11_MODULE.
inline void bind(pybind11::module_& module) {
    namespace py = pybind11;
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const Error& e) {
            py::set_error(py::module_::import("tests.simt.memory").attr("SimtError"), e.what());
        }
    });
    module.def("allow", &allow, py::arg("address"), py::arg("bytes"), py::arg("name"), py::arg("writable"));
    module.def("forget", &forget, py::arg("address"));
    module.def("set_order", &set_order_by_name, py::arg("order"), py::arg("seed") = 0);
    module.def("counters", &counters);
}

}  // namespace simt

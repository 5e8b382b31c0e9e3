// The module quantlib._cuda: what was built, the facts of the chips at hand, CUDA's errors, and the launchers of each folder.
// Loading it starts no CUDA context and needs no driver.
#include "bindings.h"

#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <exception>
#include <string>
#include <utility>

#include "common/check.h"
#include "quantlib_cuda_facts.h"

namespace py = pybind11;
using namespace quantlib::cuda;

namespace {

constexpr std::pair<const char*, cudaDeviceAttr> PROPERTIES[] = {
    {"major", cudaDevAttrComputeCapabilityMajor},
    {"minor", cudaDevAttrComputeCapabilityMinor},
    {"multiprocessors", cudaDevAttrMultiProcessorCount},
    {"shared_per_block", cudaDevAttrMaxSharedMemoryPerBlockOptin},
    {"shared_per_multiprocessor", cudaDevAttrMaxSharedMemoryPerMultiprocessor},
    {"registers_per_multiprocessor", cudaDevAttrMaxRegistersPerMultiprocessor},
    {"threads_per_multiprocessor", cudaDevAttrMaxThreadsPerMultiProcessor},
    {"l2_bytes", cudaDevAttrL2CacheSize},
};

py::dict device_properties(int device) {
    py::dict found;
    for (const auto& [name, attribute] : PROPERTIES) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, attribute, device), "device_properties", {{"device", device}});
        found[name] = value;
    }
    return found;
}

py::dict facts() { return py::module_::import("json").attr("loads")(BUILD_FACTS); }

int device_count() {
    int count = 0;
    check(cudaGetDeviceCount(&count), "device_count");
    return count;
}

std::pair<int, int> versions() {
    int driver = 0, runtime = 0;
    check(cudaDriverGetVersion(&driver), "versions");
    check(cudaRuntimeGetVersion(&runtime), "versions");
    return {driver, runtime};
}

// A CudaError becomes the module's exception of that name, with what it says in parts beside the message.
void translate(const CudaError& error, py::handle type) {
    py::object raised = type(error.what());
    raised.attr("kernel") = error.kernel;
    raised.attr("shape") = error.shape;
    raised.attr("reason") = error.reason.empty() ? error.what() : error.reason;
    raised.attr("code") = error.code;
    PyErr_SetObject(type.ptr(), raised.ptr());
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of quantlib";

    static py::handle cuda_error = py::exception<CudaError>(module, "CudaError", PyExc_RuntimeError).release();
    py::register_local_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const CudaError& error) {
            translate(error, cuda_error);
        }
    });

    module.def("facts", &facts,
               "What was built: nvcc, compiler, families, sources with their targets, kernels with registers and spills.");
    module.def("kernels", [] { return py::object(facts()["kernels"]); },
               "The kernels inside: family, source, name, symbol, and what each takes on each target.");
    module.def("device_count", &device_count, "How many GPUs the driver shows.");
    module.def("versions", &versions, "(what CUDA the driver supports, the runtime inside), as 13000 for 13.0.");
    module.def("device_properties", &device_properties, py::arg("device"), "Sizes of a GPU, from the driver.");

#ifdef QUANTLIB_HAS_COMMON
    bind_common(module);
#endif
#ifdef QUANTLIB_HAS_SM80
    bind_sm80(module);
#endif
#ifdef QUANTLIB_HAS_SM90
    bind_sm90(module);
#endif
#ifdef QUANTLIB_HAS_SM100
    bind_sm100(module);
#endif
#ifdef QUANTLIB_HAS_SM120
    bind_sm120(module);
#endif
}

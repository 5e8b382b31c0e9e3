#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace quantlib::cpu {

namespace scalar {
extern const Kernels kernels;
}
#ifdef QUANTLIB_HAS_AVX2
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef QUANTLIB_HAS_AVX512
namespace avx512 {
extern const Kernels kernels;
}
#endif
#ifdef QUANTLIB_HAS_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

struct Isa {
    std::string name;
    const Kernels* kernels;
};

const std::vector<std::string> KNOWN = {"scalar", "avx2", "avx512", "avx512_bf16"};

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the wide registers.
std::vector<Isa> detect() {
    std::vector<Isa> found = {{"scalar", &scalar::kernels}};
#ifdef QUANTLIB_HAS_AVX2
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2) found.push_back({"avx2", &avx2::kernels});
#ifdef QUANTLIB_HAS_AVX512
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        found.push_back({"avx512", &avx512::kernels});
#ifdef QUANTLIB_HAS_AVX512_BF16
        if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")) {
            found.push_back({"avx512_bf16", &avx512_bf16::kernels});
        }
#endif
    }
#endif
#endif
    return found;
}

const std::vector<Isa>& available() {
    static const std::vector<Isa> found = detect();
    return found;
}

const Isa* current = nullptr;

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& each : available()) names.push_back(each.name);
    return names;
}

void choose_isa() {
    current = &available().back();
    const char* wanted = std::getenv("QUANTLIB_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return;
    const auto limit = std::find(KNOWN.begin(), KNOWN.end(), wanted);
    if (limit == KNOWN.end()) {
        throw std::invalid_argument("QUANTLIB_CPU_ISA=" + std::string(wanted) +
                                    " is unknown: expected scalar, avx2, avx512 or avx512_bf16");
    }
    for (const Isa& each : available()) {
        if (std::find(KNOWN.begin(), KNOWN.end(), each.name) <= limit) current = &each;
    }
}

void set_isa(const std::string& name) {
    std::string names;
    for (const Isa& each : available()) {
        if (each.name == name) {
            current = &each;
            return;
        }
        names += (names.empty() ? "" : ", ") + each.name;
    }
    throw std::invalid_argument("instruction set " + name + " is not available: this machine and build have " + names);
}

const std::string& isa() { return current->name; }
const Kernels& kernels() { return *current->kernels; }

}  // namespace quantlib::cpu

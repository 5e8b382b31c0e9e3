#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace quantlib::cpu {

// What was not compiled has no kernels.
namespace scalar {
extern const Kernels kernels;
}
#ifdef QUANTLIB_HAS_AVX2
namespace avx2 {
extern const Kernels kernels;
}
constexpr const Kernels* AVX2_KERNELS = &avx2::kernels;
#else
constexpr const Kernels* AVX2_KERNELS = nullptr;
#endif
#ifdef QUANTLIB_HAS_AVX512
namespace avx512 {
extern const Kernels kernels;
}
constexpr const Kernels* AVX512_KERNELS = &avx512::kernels;
#else
constexpr const Kernels* AVX512_KERNELS = nullptr;
#endif
#ifdef QUANTLIB_HAS_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kernels;
}
constexpr const Kernels* AVX512_BF16_KERNELS = &avx512_bf16::kernels;
#else
constexpr const Kernels* AVX512_BF16_KERNELS = nullptr;
#endif
#ifdef QUANTLIB_HAS_AMX
namespace amx {
extern const Kernels kernels;
}
constexpr const Kernels* AMX_KERNELS = &amx::kernels;
#else
constexpr const Kernels* AMX_KERNELS = nullptr;
#endif

namespace {

struct Isa {
    const char* name;
    Features needs;
    const Kernels* kernels;
};

constexpr Isa ISAS[] = {
    {"scalar", SCALAR_NEEDS, &scalar::kernels},
    {"avx2", AVX2_NEEDS, AVX2_KERNELS},
    {"avx512", AVX512_NEEDS, AVX512_KERNELS},
    {"avx512_bf16", AVX512_BF16_NEEDS, AVX512_BF16_KERNELS},
    {"amx", AMX_NEEDS, AMX_KERNELS},
};
constexpr int COUNT = sizeof(ISAS) / sizeof(ISAS[0]);

constexpr bool ordered() {
    for (int i = 1; i < COUNT; ++i) {
        if ((ISAS[i].needs & ISAS[i - 1].needs) != ISAS[i - 1].needs) return false;
    }
    return ISAS[0].needs == 0;
}
static_assert(ordered(), "each instruction set needs all that the one before it does, the first nothing");

bool runs(const Isa& isa, Features features) { return isa.kernels != nullptr && (features & isa.needs) == isa.needs; }

// The set of that name, or null.
const Isa* known(const std::string& name) {
    for (const Isa& each : ISAS) {
        if (name == each.name) return &each;
    }
    return nullptr;
}

const Isa& best(Features features, const std::string& limit) {
    const Isa* last = limit.empty() ? &ISAS[COUNT - 1] : known(limit);
    if (last == nullptr) {
        std::string words;
        for (const Isa& each : ISAS) words += std::string(words.empty() ? "" : ", ") + each.name;
        throw std::invalid_argument("QUANTLIB_CPU_ISA=" + limit + " is unknown: expected one of " + words);
    }
    while (!runs(*last, features)) --last;  // scalar always runs
    return *last;
}

const Isa* current = nullptr;

}  // namespace

std::vector<std::string> isas_for(Features features) {
    std::vector<std::string> names;
    for (const Isa& each : ISAS) {
        if (runs(each, features)) names.emplace_back(each.name);
    }
    return names;
}

std::string isa_for(Features features, const std::string& limit) { return best(features, limit).name; }

Features needs_of(const std::string& isa) {
    const Isa* found = known(isa);
    if (found == nullptr) throw std::invalid_argument(isa + " is no instruction set");
    return found->needs;
}

Features machine_features() {
    static const Features found = features_of(read_registers());
    return found;
}

std::vector<std::string> available_isas() { return isas_for(machine_features()); }

void choose_isa() {
    const char* limit = std::getenv("QUANTLIB_CPU_ISA");
    current = &best(machine_features(), limit == nullptr ? "" : limit);
}

void set_isa(const std::string& name) {
    const Isa* wanted = known(name);
    if (wanted != nullptr && runs(*wanted, machine_features())) {
        current = wanted;
        return;
    }
    std::string names;
    for (const std::string& each : available_isas()) names += (names.empty() ? "" : ", ") + each;
    throw std::invalid_argument("instruction set " + name + " is not available: this machine and build have " + names);
}

std::string isa() { return current->name; }
const Kernels& kernels() { return *current->kernels; }

}  // namespace quantlib::cpu

#include "features.h"

#include <stdexcept>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define QUANTLIB_X86
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace quantlib::cpu {

namespace {

// Present where all bits of `mask` are set in the register.
struct Entry {
    const char* name;
    Feature feature;
    uint32_t CpuRegisters::*reg;
    uint32_t mask;
};

constexpr uint32_t OSXSAVE = 1u << 27;  // leaf 1, ECX
constexpr uint32_t TILE_STATE = 3u << 17;  // XCR0: XTILECFG and XTILEDATA

// Names as in /proc/cpuinfo, but sse3 (there: pni) and the three that are the operating system's. Bits: Intel's Software
// Developer's Manual, volume 2, CPUID; volume 1, 13.3 for XCR0: SSE and AVX state, then opmask, ZMM_Hi256 and Hi16_ZMM.
constexpr Entry ENTRIES[] = {
    {"sse3", SSE3, &CpuRegisters::leaf1_ecx, 1u << 0},
    {"ssse3", SSSE3, &CpuRegisters::leaf1_ecx, 1u << 9},
    {"sse4_1", SSE4_1, &CpuRegisters::leaf1_ecx, 1u << 19},
    {"sse4_2", SSE4_2, &CpuRegisters::leaf1_ecx, 1u << 20},
    {"popcnt", POPCNT, &CpuRegisters::leaf1_ecx, 1u << 23},
    {"avx", AVX, &CpuRegisters::leaf1_ecx, 1u << 28},
    {"f16c", F16C, &CpuRegisters::leaf1_ecx, 1u << 29},
    {"fma", FMA, &CpuRegisters::leaf1_ecx, 1u << 12},
    {"avx2", AVX2, &CpuRegisters::leaf7_ebx, 1u << 5},
    {"os_ymm", OS_YMM, &CpuRegisters::xcr0, 0x06u},
    {"avx512f", AVX512F, &CpuRegisters::leaf7_ebx, 1u << 16},
    {"avx512bw", AVX512BW, &CpuRegisters::leaf7_ebx, 1u << 30},
    {"avx512vl", AVX512VL, &CpuRegisters::leaf7_ebx, 1u << 31},
    {"avx512dq", AVX512DQ, &CpuRegisters::leaf7_ebx, 1u << 17},
    {"os_zmm", OS_ZMM, &CpuRegisters::xcr0, 0xE6u},
    {"avx512_bf16", AVX512_BF16, &CpuRegisters::leaf7_1_eax, 1u << 5},
    {"avx512vbmi", AVX512VBMI, &CpuRegisters::leaf7_ecx, 1u << 1},
    {"amx_tile", AMX_TILE, &CpuRegisters::leaf7_edx, 1u << 24},
    {"amx_bf16", AMX_BF16, &CpuRegisters::leaf7_edx, 1u << 22},
    {"os_tiles", OS_TILES, &CpuRegisters::xcr0, TILE_STATE},
    {"avx512_vnni", AVX512_VNNI, &CpuRegisters::leaf7_ecx, 1u << 11},
};

// Linux gives the 8 KB of tile registers to processes that ask (Documentation/arch/x86/xstate.rst); others give them to all.
bool tiles_granted() {
#if defined(QUANTLIB_X86) && defined(__linux__)
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
    return true;
#endif
}

}  // namespace

CpuRegisters read_registers() {
    CpuRegisters found = {};
#ifdef QUANTLIB_X86
    // __get_cpuid answers 0 where there is no such leaf.
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return found;
    found.leaf1_ecx = ecx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0) {
        found.leaf7_ebx = ebx, found.leaf7_ecx = ecx, found.leaf7_edx = edx;
        // EAX is the last subleaf; beyond it there are zeros or nothing that means anything.
        if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0) found.leaf7_1_eax = eax;
    }
    // Without OSXSAVE the instruction itself would be illegal. As bytes, because its intrinsic asks for a compiler flag.
    if ((found.leaf1_ecx & OSXSAVE) != 0) {
        asm volatile(".byte 0x0F, 0x01, 0xD0" : "=a"(found.xcr0), "=d"(edx) : "c"(0));
        if ((found.xcr0 & TILE_STATE) == TILE_STATE && !tiles_granted()) found.xcr0 &= ~TILE_STATE;
    }
#endif
    return found;
}

Features features_of(const CpuRegisters& registers) {
    CpuRegisters known = registers;
    if ((known.leaf1_ecx & OSXSAVE) == 0) known.xcr0 = 0;
    Features found = 0;
    for (const Entry& entry : ENTRIES) {
        if ((known.*entry.reg & entry.mask) == entry.mask) found |= entry.feature;
    }
    return found;
}

std::vector<std::string> feature_names(Features features) {
    std::vector<std::string> names;
    for (const Entry& entry : ENTRIES) {
        if ((features & entry.feature) != 0) names.emplace_back(entry.name);
    }
    return names;
}

Features features_named(const std::vector<std::string>& names) {
    Features features = 0;
    for (const std::string& name : names) {
        Features found = 0;
        for (const Entry& entry : ENTRIES) {
            if (name == entry.name) found = entry.feature;
        }
        if (found == 0) throw std::invalid_argument("unknown CPU feature " + name);
        features |= found;
    }
    return features;
}

}  // namespace quantlib::cpu

// What a CPU and its operating system offer, as far as an instruction set asks for it. Compiled for the baseline.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace quantlib::cpu {

// A set of features, one bit each.
using Features = uint32_t;

enum Feature : Features {
    SSE3 = 1u << 0,
    SSSE3 = 1u << 1,
    SSE4_1 = 1u << 2,
    SSE4_2 = 1u << 3,
    POPCNT = 1u << 4,
    AVX = 1u << 5,
    F16C = 1u << 6,
    FMA = 1u << 7,
    AVX2 = 1u << 8,
    OS_YMM = 1u << 9,  // the operating system saves the wide registers of a thread that it interrupts
    AVX512F = 1u << 10,
    AVX512BW = 1u << 11,
    AVX512VL = 1u << 12,
    AVX512DQ = 1u << 13,
    OS_ZMM = 1u << 14,
    AVX512_BF16 = 1u << 15,
    AVX512VBMI = 1u << 16,
    AMX_TILE = 1u << 17,
    AMX_BF16 = 1u << 18,
    OS_TILES = 1u << 19,
    AVX512_VNNI = 1u << 20,
};

// What a compiler takes for granted when it is given the flags of an instruction set (ISA_FLAGS in build_tools/cpu.py; a test
// compares). Each set asks for all that the one before it does.
constexpr Features SCALAR_NEEDS = 0;
constexpr Features AVX2_NEEDS = SSE3 | SSSE3 | SSE4_1 | SSE4_2 | POPCNT | AVX | F16C | FMA | AVX2 | OS_YMM;
constexpr Features AVX512_NEEDS = AVX2_NEEDS | AVX512F | AVX512BW | AVX512VL | AVX512DQ | OS_ZMM;
constexpr Features AVX512_BF16_NEEDS = AVX512_NEEDS | AVX512_BF16 | AVX512VBMI | AVX512_VNNI;
constexpr Features AMX_NEEDS = AVX512_BF16_NEEDS | AMX_TILE | AMX_BF16 | OS_TILES;

// What the instructions CPUID (by leaf and register) and XGETBV answer; zero where a leaf or the instruction is missing.
struct CpuRegisters {
    uint32_t leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf7_1_eax;
    uint32_t xcr0;  // of no meaning where leaf 1 doesn't say that the operating system lets programs ask
};

// Those of this machine; all zero where it is no x86. The operating system is asked to let this process use tiles; where it
// refuses, XCR0 is given without them.
CpuRegisters read_registers();

Features features_of(const CpuRegisters& registers);

// All names, in the order of their bits.
std::vector<std::string> feature_names(Features features = ~Features(0));

// Throws std::invalid_argument where a name is unknown.
Features features_named(const std::vector<std::string>& names);

}  // namespace quantlib::cpu

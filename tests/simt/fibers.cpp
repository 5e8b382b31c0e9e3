#include "fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator's fibers are written for Linux on x86-64"
#endif

namespace simt {

namespace {

constexpr size_t STACK_BYTES = 256 << 10, GUARD_BYTES = 4096;

// Pages are taken when first touched, so that the size costs address space only. The lowest page stays closed.
std::byte* map_stack() {
    void* memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE) != 0) throw std::bad_alloc();
    return static_cast<std::byte*>(memory);
}

}  // namespace

void* fresh_stack(size_t index, void (*entry)()) {
    static std::vector<std::byte*> stacks;
    while (stacks.size() <= index) stacks.push_back(map_stack());
    // From the top: no return address, where unwinding ends; the entry, to which the switch returns; six registers.
    uintptr_t* top = reinterpret_cast<uintptr_t*>(stacks[index] + STACK_BYTES);
    *--top = 0;
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    return top;
}

asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, .-simt_switch
)");

}  // namespace simt

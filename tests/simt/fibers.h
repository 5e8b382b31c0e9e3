// Stacks and the switch between them. A switch saves what the calling convention keeps and nothing else: no system call.
#pragma once

#include <cstddef>

namespace simt {

// Prepares stack `index` (kept for the next launch) so that the first switch to it calls `entry`, which must never return.
void* fresh_stack(size_t index, void (*entry)());

// Leaves the running stack, storing where it stands in *from, and goes on where `to` stands.
extern "C" void simt_switch(void** from, void* to);

}  // namespace simt

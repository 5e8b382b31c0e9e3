// The running block: its threads, who waits for what, and the two ways of waiting, block barriers and collectives of a warp.
#pragma once

#include <cstdarg>
#include <exception>
#include <vector>

#include "simt.h"

namespace simt {

struct Thread {
    bool waits = false, done = false, steady = false;
    const char* waits_for = "";
    Site site;
    void* stack_pointer = nullptr;
};

constexpr int WARPGROUP = 128;

// Threads that follow each other and come together at a call: a warp, or the four warps of a warpgroup.
struct Meeting {
    int arrived = 0;
    const char* name = nullptr;
    Site site;
    void* arguments[WARPGROUP] = {};
};

struct Warp {
    uint32_t ready = 0, done = 0;  // bits of lanes
    Meeting meeting;
};

struct GroupBarrier {
    std::vector<int> members;  // who has arrived
    int threads = 0;
    Site site;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Meeting> warpgroups;
    std::vector<int> warp_order;
    GroupBarrier groups[16];  // of sync_group, by number
    int arrived = 0, done = 0;  // threads at the barrier, threads that ended
    Site barrier;               // where the first of those at the barrier waits
    std::exception_ptr error;
    void* scheduler = nullptr;
};
extern Block block;

[[noreturn]] [[gnu::format(printf, 3, 4)]] void fail(int thread, Site site, const char* format, ...);

bool same_place(const Site& a, const Site& b);

// Leaves the running thread until somebody makes it ready.
void suspend(const char* waits_for, Site site);
void make_ready(int thread);

// Meets the other lanes of the warp, or the other threads of the warpgroup, at a call named `name`; the last to arrive calls
// perform with what each brought.
using Perform = void (*)(void* const* arguments);
void collective(const char* name, Site site, void* argument, Perform perform);
void warpgroup_collective(const char* name, Site site, void* argument, Perform perform);

// Where block orders prefer the last over the first.
bool reversed();

}  // namespace simt

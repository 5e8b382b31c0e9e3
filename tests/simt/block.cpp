#include "block.h"

#include <algorithm>
#include <cstdio>
#include <random>

#include "banks.h"
#include "barriers.h"
#include "fibers.h"
#include "global.h"
#include "products.h"
#include "shared.h"

namespace simt {

Machine machine;
Block block;
Counters measured;
namespace {

struct Launch {
    const std::function<void()>* kernel = nullptr;
    Order order = Order::forward;
    uint64_t seed = 0;
};
Launch current;

std::string place(Site site) {
    const std::string path = site.file_name();
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

// "0-31, 40": which threads fulfil a condition, in few words.
template <class Condition>
std::string thread_ranges(Condition holds) {
    std::string words;
    const int count = int(block.threads.size());
    for (int first = 0; first < count; ++first) {
        if (!holds(block.threads[first])) continue;
        int last = first;
        while (last + 1 < count && holds(block.threads[last + 1])) ++last;
        words += (words.empty() ? "" : ", ") + std::to_string(first) + (last > first ? "-" + std::to_string(last) : "");
        first = last;
    }
    return words;
}

// Who waits where: one line for each place.
std::string waiting() {
    std::string words;
    std::vector<std::string> told;
    for (const Thread& each : block.threads) {
        if (!each.waits && !each.done) continue;
        const auto line_of = [](const Thread& t) {
            return t.done ? std::string("ended") : t.waits_for + (" at " + place(t.site));
        };
        const std::string line = line_of(each);
        if (std::find(told.begin(), told.end(), line) != told.end()) continue;
        told.push_back(line);
        const auto alike = [&](const Thread& t) { return (t.waits || t.done) && line_of(t) == line; };
        words += "\n    " + line + ": threads " + thread_ranges(alike);
    }
    return words;
}

void check_end_of_thread() {
    const Meeting& warp = block.warps[machine.thread / WARP].meeting;
    const char* what = warp.arrived != 0 ? warp.name : block.arrived != 0 ? "sync_threads" : nullptr;
    if (what == nullptr) return;
    fail(machine.thread, Site(), "the thread ends while others wait for it at %s:%s", what, waiting().c_str());
}

void go_on_elsewhere(void** from);

void run_thread() {
    try {
        (*current.kernel)();
        check_end_of_thread();
    } catch (...) {
        block.error = std::current_exception();
    }
    Thread& self = block.threads[machine.thread];
    void* abandoned;
    if (block.error) simt_switch(&abandoned, block.scheduler);
    self.done = true;
    block.warps[machine.thread / WARP].done |= 1u << machine.thread % WARP;
    ++block.done;
    go_on_elsewhere(&abandoned);
}

int next_lane(uint32_t ready) {
    if (current.order == Order::reverse) return 31 - __builtin_clz(ready);
    return __builtin_ctz(ready);
}

// To the next ready thread, of the same warp if it can be; to the scheduler if there is none.
void go_on_elsewhere(void** from) {
    int warp = machine.thread / WARP;
    if (block.warps[warp].ready == 0) {
        warp = -1;
        for (int each : block.warp_order) {
            if (block.warps[each].ready == 0) continue;
            warp = each;
            break;
        }
        if (warp < 0) return simt_switch(from, block.scheduler);
    }
    const int lane = next_lane(block.warps[warp].ready);
    block.warps[warp].ready &= ~(1u << lane);
    machine.thread = warp * WARP + lane;
    simt_switch(from, block.threads[machine.thread].stack_pointer);
}

template <class Items>
void arrange(Items& items, uint64_t seed) {
    if (current.order == Order::reverse) std::reverse(items.begin(), items.end());
    if (current.order == Order::random) {
        std::mt19937_64 generator(seed);
        std::shuffle(items.begin(), items.end(), generator);
    }
}

void run_block(uint64_t seed) {
    const int warps = machine.threads / WARP;
    block.threads.assign(machine.threads, Thread());
    block.warps.assign(warps, Warp());
    block.warpgroups.assign(machine.threads / WARPGROUP, Meeting());
    for (GroupBarrier& each : block.groups) each = {};
    block.warp_order.resize(warps);
    for (int w = 0; w < warps; ++w) block.warp_order[w] = w, block.warps[w].ready = ~0u;
    arrange(block.warp_order, seed);
    block.arrived = block.done = 0;
    block.error = nullptr;
    for (int t = 0; t < machine.threads; ++t) block.threads[t].stack_pointer = fresh_stack(t, run_thread);
    shared.begin_block();
    barriers.begin_block();
    products.begin_block(warps);
    banks.begin_block(warps);

    machine.thread = block.warp_order[0] * WARP;
    go_on_elsewhere(&block.scheduler);
    if (block.error) std::rethrow_exception(block.error);
    if (block.done != machine.threads) {
        throw Error("deadlock in block (" + std::to_string(machine.block.x) + ", " + std::to_string(machine.block.y) + ", " +
                    std::to_string(machine.block.z) + "), everybody waits:" + waiting() + barriers.unfinished());
    }
    barriers.end_block();
    products.end_block();
    for (int w = 0; w < warps; ++w) banks.flush(w);
}

}  // namespace

void set_order(Order order, uint64_t seed) { current.order = order, current.seed = seed; }

void launch(Dim grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    if (threads < WARP || threads > 1024 || threads % WARP != 0) {
        throw Error("a block has 32 to 1024 threads in whole warps, found " + std::to_string(threads));
    }
    if (grid.x < 1 || grid.y < 1 || grid.z < 1) throw Error("a grid has at least one block");
    if (current.kernel != nullptr) throw Error("a launch inside a launch");
    struct Ended {
        ~Ended() { current.kernel = nullptr; }
    } ended;
    current.kernel = &kernel;
    measured = {};
    machine.threads = threads, machine.grid = grid;
    machine.shared = shared.begin_launch(shared_bytes, threads);
    global.begin_launch();
    std::vector<int64_t> order(int64_t(grid.x) * grid.y * grid.z);
    for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
    arrange(order, current.seed);
    for (int64_t index : order) {
        machine.block = {int(index % grid.x), int(index / grid.x % grid.y), int(index / grid.x / grid.y)};
        global.begin_block(uint32_t(index));
        run_block(current.seed + uint64_t(index));
    }
}

void fail(int thread, Site site, const char* format, ...) {
    char words[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(words, sizeof(words), format, arguments);
    va_end(arguments);
    char where[128];
    snprintf(where, sizeof(where), "\n  block (%d, %d, %d), thread %d (warp %d, lane %d)", machine.block.x, machine.block.y,
             machine.block.z, thread, thread / WARP, thread % WARP);
    std::string message = std::string(words) + where;
    if (site.line() != 0) message += ", " + place(site) + " in " + site.function_name();
    throw Error(message);
}

bool same_place(const Site& a, const Site& b) { return a.line() == b.line() && strcmp(a.file_name(), b.file_name()) == 0; }

void suspend(const char* waits_for, Site site) {
    const int thread = machine.thread;
    Thread& self = block.threads[thread];
    self.waits = true, self.waits_for = waits_for, self.site = site;
    go_on_elsewhere(&self.stack_pointer);
    machine.thread = thread;
}

void make_ready(int thread) {
    block.threads[thread].waits = false;
    block.warps[thread / WARP].ready |= 1u << thread % WARP;
}

void steady(bool on) { block.threads[machine.thread].steady = on; }

void sync_threads(Site site) {
    ++measured.operations;
    if (block.done != 0) fail(machine.thread, site, "a barrier for which some threads never come:%s", waiting().c_str());
    if (block.arrived == 0) block.barrier = site;
    if (!same_place(block.barrier, site)) {
        fail(machine.thread, site, "divergent barriers: others wait at another sync_threads:%s", waiting().c_str());
    }
    if (++block.arrived < machine.threads) return suspend("sync_threads", site);
    block.arrived = 0;
    shared.order_block();
    for (int w = 0; w < int(block.warps.size()); ++w) banks.flush(w);
    for (int t = 0; t < machine.threads; ++t) {
        if (t != machine.thread) make_ready(t);
    }
}

namespace {

void meet(Meeting& meeting, int first, int size, const char* name, Site site, void* argument, Perform perform) {
    ++measured.operations;
    for (int t = first; t < first + size; t += WARP) {
        if (block.warps[t / WARP].done == 0) continue;
        fail(machine.thread, site, "%s for which some threads never come:%s", name, waiting().c_str());
    }
    if (meeting.arrived == 0) meeting.name = name, meeting.site = site;
    if (meeting.name != name || !same_place(meeting.site, site)) {
        fail(machine.thread, site, "divergent warp: %s here, and others wait elsewhere:%s", name, waiting().c_str());
    }
    meeting.arguments[machine.thread - first] = argument;
    if (++meeting.arrived < size) return suspend(name, site);
    meeting.arrived = 0;
    for (int t = first; t < first + size; t += WARP) banks.flush(t / WARP);
    perform(meeting.arguments);
    for (int t = first; t < first + size; ++t) {
        if (t != machine.thread) make_ready(t);
    }
}

}  // namespace

void collective(const char* name, Site site, void* argument, Perform perform) {
    const int warp = machine.thread / WARP;
    meet(block.warps[warp].meeting, warp * WARP, WARP, name, site, argument, perform);
}

void warpgroup_collective(const char* name, Site site, void* argument, Perform perform) {
    const int group = machine.thread / WARPGROUP;
    if (group >= int(block.warpgroups.size())) fail(machine.thread, site, "%s outside a whole warpgroup", name);
    meet(block.warpgroups[group], group * WARPGROUP, WARPGROUP, name, site, argument, perform);
}

void sync_group(int id, int threads, Site site) {
    ++measured.operations;
    if (id < 1 || id > 15 || threads < WARP || threads > machine.threads || threads % WARP != 0) {
        fail(machine.thread, site, "sync_group(%d, %d): numbers are 1 to 15, sizes whole warps", id, threads);
    }
    GroupBarrier& group = block.groups[id];
    if (group.members.empty()) group.threads = threads, group.site = site;
    if (group.threads != threads || !same_place(group.site, site)) {
        fail(machine.thread, site, "divergent barriers: sync_group %d is awaited elsewhere too:%s", id, waiting().c_str());
    }
    group.members.push_back(machine.thread);
    if (int(group.members.size()) < threads) return suspend("sync_group", site);
    shared.order_group(group.members);
    for (int t : group.members) {
        if (t != machine.thread) make_ready(t);
    }
    group.members.clear();
}

bool reversed() { return current.order == Order::reverse; }

}  // namespace simt

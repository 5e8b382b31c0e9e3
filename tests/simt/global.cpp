#include "global.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "block.h"

namespace simt {

Global global;

Global::Range* Global::below(uintptr_t address) {
    const auto after = ranges_.upper_bound(address);
    return after == ranges_.begin() ? nullptr : &std::prev(after)->second;
}

void Global::allow(uintptr_t address, size_t bytes, const std::string& name, bool writable) {
    const Range* before = below(address + bytes - (bytes != 0));
    if (before != nullptr && before->end > address) throw Error("the ranges of " + name + " and " + before->name + " overlap");
    ranges_[address] = {address, address + bytes, name, writable, nullptr};
}

void Global::forget(uintptr_t address) {
    latest_ = nullptr;
    ranges_.erase(address);
}

void Global::begin_launch() {
    for (auto& [address, range] : ranges_) range.writes.reset();
    counters_.clear();
}

Global::Range& Global::find(int thread, const void* pointer, size_t bytes, size_t alignment, bool write, Site site) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    const char* what = write ? "write" : "read";
    if (latest_ == nullptr || address < latest_->begin || address + bytes > latest_->end) {
        Range* candidate = below(address);
        if (candidate == nullptr) {
            fail(thread, site, "global %s of %zu bytes at %p, below all known memory", what, bytes, pointer);
        }
        if (address + bytes > candidate->end) {
            fail(thread, site, "global %s of %zu bytes at %p, outside known memory: %zu bytes past the start of %s (%zu bytes)",
                 what, bytes, pointer, size_t(address - candidate->begin), candidate->name.c_str(),
                 size_t(candidate->end - candidate->begin));
        }
        latest_ = candidate;
    }
    if (address % alignment != 0) {
        fail(thread, site, "misaligned: global %s of %zu bytes at %p, byte %zu of %s", what, bytes, pointer,
             size_t(address - latest_->begin), latest_->name.c_str());
    }
    if (write && !latest_->writable) {
        fail(thread, site, "global write to byte %zu of %s, which is read only", size_t(address - latest_->begin),
             latest_->name.c_str());
    }
    return *latest_;
}

bool Global::ordered(Write write, int thread) const {
    if (write.block == 0) return true;
    if (write.block == block_) return shared.ordered(write.stamp, thread);
    for (const Takeover& each : taken_over_) {
        const auto known = each.knowledge.find(write.block);
        if (known != each.knowledge.end() && shared.within(write.stamp, known->second) && shared.ordered(each.stamp, thread)) {
            return true;
        }
    }
    return false;
}

void Global::check_read(int thread, const void* from, size_t bytes, size_t alignment, Reading reading, Site site) {
    const Range& range = find(thread, from, bytes, alignment, false, site);
    if (range.writes == nullptr) return;
    const size_t at = reinterpret_cast<uintptr_t>(from) - range.begin;
    for (size_t b = at; b < at + bytes; ++b) {
        const Write write = range.writes[b];
        if (write.block == 0) continue;
        if (reading == Reading::constant) {
            fail(thread, site, "load_stream of byte %zu of %s, which block %u wrote in this launch", b, range.name.c_str(),
                 write.block - 1);
        }
        if (ordered(write, thread)) continue;
        fail(thread, site, "race: read of byte %zu of %s, which %s of block %u wrote, and nothing in between orders them", b,
             range.name.c_str(), shared.name_of(write.stamp).c_str(), write.block - 1);
    }
}

void Global::check_write(int thread, const void* to, size_t bytes, Site site) {
    Range& range = find(thread, to, bytes, bytes, true, site);
    if (range.writes == nullptr) {
        // calloc gives untouched pages for large ranges: only what is written costs memory.
        range.writes.reset(static_cast<Write*>(calloc(range.end - range.begin, sizeof(Write))));
        if (range.writes == nullptr) throw std::bad_alloc();
    }
    const size_t at = reinterpret_cast<uintptr_t>(to) - range.begin;
    const Write self = {block_, shared.stamp(thread)};
    for (size_t b = at; b < at + bytes; ++b) {
        Write& write = range.writes[b];
        if (!ordered(write, thread)) {
            fail(thread, site, "race: write of byte %zu of %s, which %s of block %u wrote too, and nothing orders them",
                 b, range.name.c_str(), shared.name_of(write.stamp).c_str(), write.block - 1);
        }
        write = self;
    }
}

void Global::meet(int thread, const int* counter, Site site) {
    find(thread, counter, sizeof(int), sizeof(int), true, site);
    Knowledge& passed_on = counters_[counter];
    const Knowledge before = passed_on;
    const auto add = [&](uint32_t block, const Clock& clock) {
        Clock& known = passed_on[block];
        known.resize(std::max(known.size(), clock.size()));
        for (size_t i = 0; i < clock.size(); ++i) known[i] = std::max(known[i], clock[i]);
    };
    add(block_, shared.view(thread));
    for (const Takeover& each : taken_over_) {
        if (!shared.ordered(each.stamp, thread)) continue;
        for (const auto& [block, clock] : each.knowledge) add(block, clock);
    }
    taken_over_.push_back({shared.stamp(thread), before});
    shared.advance();
}

// What kernels call

void allow(uintptr_t address, size_t bytes, const std::string& name, bool writable) {
    global.allow(address, bytes, name, writable);
}

void forget(uintptr_t address) { global.forget(address); }

void read_global(void* to, const void* from, size_t bytes, bool constant, Site site) {
    ++measured.operations;
    const Global::Reading reading = constant ? Global::Reading::constant : Global::Reading::ordinary;
    global.check_read(machine.thread, from, bytes, bytes, reading, site);
    memcpy(to, from, bytes);
}

void write_global(void* to, const void* from, size_t bytes, Site site) {
    ++measured.operations;
    global.check_write(machine.thread, to, bytes, site);
    memcpy(to, from, bytes);
}

int add_acquire_release(int* counter, int value, Site site) {
    ++measured.operations;
    global.meet(machine.thread, counter, site);
    const int old = *counter;
    *counter = old + value;
    return old;
}

}  // namespace simt

#include "barriers.h"

#include <algorithm>

#include "block.h"
#include "global.h"
#include "simt90.h"

namespace simt {

Barriers barriers;
namespace {

constexpr int64_t MOST_ARRIVALS = (1 << 20) - 1, MOST_BYTES = (1 << 20) - 1;

}  // namespace

void Barriers::end_block() const {
    for (const auto& [offset, state] : barriers_) {
        if (state.flying.empty()) continue;
        throw Error("the block ends while a bulk copy is under way, for the barrier at byte " + std::to_string(offset));
    }
}

std::string Barriers::unfinished() const {
    std::string words;
    for (const auto& [offset, s] : barriers_) {
        words += "\n    barrier at byte " + std::to_string(offset) + ": phase " + std::to_string(s.phase) + ", " +
                 std::to_string(s.pending) + " of " + std::to_string(s.arrivals) + " arrivals missing, " +
                 std::to_string(s.expected) + " bytes announced, " + std::to_string(s.brought) + " under way";
    }
    return words;
}

Barriers::State& Barriers::find(int thread, const uint64_t* place, Site site) {
    const auto found = barriers_.find(shared.offset(place));
    if (found == barriers_.end()) fail(thread, site, "no barrier was prepared at shared byte %u", shared.offset(place));
    if (!shared.ordered(found->second.prepared, thread)) {
        fail(thread, site, "race: the barrier at shared byte %u was prepared by thread %d with no sync_threads in between",
             shared.offset(place), found->second.preparer);
    }
    return found->second;
}

void Barriers::init(int thread, uint64_t* place, int arrivals, Site site) {
    const uint32_t at = shared.offset(place);
    if (barriers_.contains(at)) fail(thread, site, "the barrier at shared byte %u exists", at);
    if (arrivals < 1 || arrivals > MOST_ARRIVALS) fail(thread, site, "a barrier can't wait for %d arrivals", arrivals);
    shared.check_write(thread, place, sizeof(uint64_t), site);
    shared.close(place, sizeof(uint64_t));
    State& state = barriers_[at];
    state.arrivals = state.pending = arrivals;
    state.agent = shared.new_agent();
    state.prepared = shared.stamp(thread), state.preparer = thread;
}

void Barriers::init_fence(int thread) {
    for (auto& [offset, state] : barriers_) state.fenced |= state.preparer == thread;
}

void Barriers::arrive(int thread, uint64_t* place, int bytes, Site site) {
    State& state = find(thread, place, site);
    if (state.pending == 0) {
        fail(thread, site, "one arrival too many in phase %d of the barrier at shared byte %u, which counts %d", state.phase,
             shared.offset(place), state.arrivals);
    }
    if (bytes < 0 || state.expected + bytes > MOST_BYTES) fail(thread, site, "a phase can't wait for %d bytes", bytes);
    shared.release(thread, state.gathering);
    --state.pending;
    state.expected += bytes;
    settle(thread, state, site);
}

// Ends the phase if it is complete: only now its copies' data is there, for those who wait.
void Barriers::settle(int thread, State& state, Site site) {
    if (state.pending != 0 || state.brought < state.expected) return;
    if (state.brought > state.expected) {
        fail(thread, site, "copies bring %lld bytes in phase %d of a barrier, for which %lld were announced",
             static_cast<long long>(state.brought), state.phase, static_cast<long long>(state.expected));
    }
    shared.finish_bulk(state.agent, state.flying, state.gathering);
    state.flying.clear();
    state.released = state.gathering;
    state.pending = state.arrivals, state.expected = state.brought = 0;
    ++state.phase;
    std::erase_if(state.waiters, [&](const Waiter& waiter) {
        if (state.phase % 2 == waiter.parity) return false;
        shared.acquire(waiter.thread, state.released);
        make_ready(waiter.thread);
        return true;
    });
}

void Barriers::wait(int thread, uint64_t* place, int parity, Site site) {
    State& state = find(thread, place, site);
    if (parity != 0 && parity != 1) fail(thread, site, "a parity is 0 or 1, found %d", parity);
    if (state.phase % 2 != parity) return shared.acquire(thread, state.released);
    state.waiters.push_back({thread, parity});
    suspend("barrier_wait", site);
}

void Barriers::copy(int thread, uint64_t* place, void* to, std::vector<std::byte> data, Site site) {
    State& state = find(thread, place, site);
    if (!state.fenced) fail(thread, site, "a copy reports to a barrier that no barrier_init_fence has shown to copies");
    shared.begin_bulk(thread, to, data.size(), site);
    state.brought += int64_t(data.size());
    state.flying.push_back({shared.offset(to), std::move(data)});
    settle(thread, state, site);
}

// What kernels call

void barrier_init(uint64_t* barrier, int arrivals, Site site) { barriers.init(machine.thread, barrier, arrivals, site); }
void barrier_init_fence() { barriers.init_fence(machine.thread); }

void barrier_arrive(uint64_t* barrier, int bytes, Site site) {
    ++measured.operations;
    barriers.arrive(machine.thread, barrier, bytes, site);
}

void barrier_wait(uint64_t* barrier, int parity, Site site) {
    ++measured.operations;
    barriers.wait(machine.thread, barrier, parity, site);
}

void fence_proxy_async() { shared.fence_async(machine.thread); }

void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier, Site site) {
    ++measured.operations;
    if (bytes < 16 || bytes % 16 != 0) fail(machine.thread, site, "a bulk copy brings a multiple of 16 bytes, found %d", bytes);
    global.check_read(machine.thread, from, bytes, 16, Global::Reading::ordinary, site);
    std::vector<std::byte> data(bytes);
    memcpy(data.data(), from, bytes);
    barriers.copy(machine.thread, barrier, to, std::move(data), site);
}

void copy_tensor(void* to, const TensorMap& map, int column, int row, uint64_t* barrier, Site site) {
    ++measured.operations;
    const uint32_t alignment = map.swizzled ? 1024 : 128;
    if (shared.offset(to) % alignment != 0) {
        fail(machine.thread, site, "a tensor copy goes to a multiple of %u bytes, found %u", alignment, shared.offset(to));
    }
    const int64_t size = map.element_bytes, box_row_bytes = map.box_columns * size;
    const int64_t first = std::max<int64_t>(column, 0), end = std::min<int64_t>(int64_t(column) + map.box_columns, map.columns);
    std::vector<std::byte> data(map.box_rows * box_row_bytes), line(box_row_bytes);
    for (int r = 0; r < map.box_rows; ++r) {
        std::fill(line.begin(), line.end(), std::byte(0));
        if (row + r >= 0 && row + r < map.rows && first < end) {
            const std::byte* from = static_cast<const std::byte*>(map.base) + (row + r) * map.row_bytes + first * size;
            global.check_read(machine.thread, from, (end - first) * size, size, Global::Reading::ordinary, site);
            memcpy(line.data() + (first - column) * size, from, (end - first) * size);
        }
        for (int64_t piece = 0; piece < box_row_bytes; piece += 16) {
            memcpy(data.data() + swizzle(r * box_row_bytes + piece, map.swizzled), line.data() + piece, 16);
        }
    }
    barriers.copy(machine.thread, barrier, to, std::move(data), site);
}

}  // namespace simt

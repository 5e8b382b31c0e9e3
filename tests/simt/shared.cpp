#include "shared.h"

#include <algorithm>
#include <numeric>

#include "banks.h"
#include "block.h"
#include "global.h"

namespace simt {

Shared shared;
namespace {

constexpr size_t ALIGNMENT = 1024, MOST_BYTES = 227 << 10;
constexpr int MOST_BARRIERS = 64;
constexpr std::byte JUNK{0xFF};  // NaN in every floating-point type

void join(Clock& into, const Clock& other) {
    for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

template <class Function>
auto for_size(size_t bytes, Function function) {
    switch (bytes) {
        case 1: return function(std::integral_constant<size_t, 1>());
        case 2: return function(std::integral_constant<size_t, 2>());
        case 4: return function(std::integral_constant<size_t, 4>());
        case 8: return function(std::integral_constant<size_t, 8>());
        default: return function(std::integral_constant<size_t, 16>());
    }
}

}  // namespace

std::byte* Shared::begin_launch(size_t bytes, int threads) {
    if (bytes > MOST_BYTES) throw Error("a block has at most 227 KiB of shared memory, asked for " + std::to_string(bytes));
    if (storage_ == nullptr) storage_ = std::make_unique<std::byte[]>(MOST_BYTES + ALIGNMENT);
    const uintptr_t start = reinterpret_cast<uintptr_t>(storage_.get());
    memory_ = storage_.get() + (ALIGNMENT - start % ALIGNMENT) % ALIGNMENT;
    bytes_ = bytes;
    warp_limit_.resize(threads / WARP);
    copies_.resize(threads);
    threads_ = threads, most_agents_ = threads + MOST_BARRIERS;
    return memory_;
}

void Shared::begin_block() {
    std::fill_n(memory_, bytes_, JUNK);
    writer_.assign(bytes_, UNWRITTEN);
    reader_.assign(bytes_, UNWRITTEN);
    other_reader_.assign(bytes_, UNWRITTEN);
    moment_ = 1, block_limit_ = 0;
    std::fill(warp_limit_.begin(), warp_limit_.end(), 0);
    for (Copies& copies : copies_) copies.pending.clear(), copies.groups = 0;
    clocks_.clear();
    async_fence_.assign(threads_, 0);
    agents_ = threads_;
}

void Shared::advance() {
    if (++moment_ >= CLOSED >> AGENT_BITS) throw Error("more synchronisations in one block than the emulator can number");
}

void Shared::order_block() {
    block_limit_ = stamp(AGENT_MASK);
    advance();
}

void Shared::order_warp(int warp) {
    warp_limit_[warp] = stamp(AGENT_MASK);
    if (!clocks_.empty()) {
        std::vector<int> lanes(WARP);
        std::iota(lanes.begin(), lanes.end(), warp * WARP);
        return order_group(lanes);
    }
    advance();
}

void Shared::order_group(const std::vector<int>& threads) {
    start_clocks();
    Clock joined(most_agents_, 0);
    for (int t : threads) {
        join(joined, clocks_[t]);
        joined[t] = moment_;
    }
    for (int t : threads) clocks_[t] = joined;
    advance();
}

void Shared::start_clocks() {
    if (!clocks_.empty()) return;
    clocks_.assign(threads_, Clock(most_agents_, 0));
    for (int t = 0; t < threads_; ++t) {
        const int first = t - t % WARP;
        std::fill_n(clocks_[t].begin() + first, WARP, warp_limit_[t / WARP] >> AGENT_BITS);
    }
}

int Shared::new_agent() {
    start_clocks();
    if (agents_ == most_agents_) throw Error("more barriers in shared memory than the emulator can number");
    return agents_++;
}

void Shared::release(int thread, Clock& to) {
    clocks_[thread][thread] = moment_;
    to.resize(most_agents_);
    join(to, clocks_[thread]);
    advance();
}

void Shared::acquire(int thread, const Clock& from) { join(clocks_[thread], from); }

void Shared::fence_async(int thread) {
    async_fence_[thread] = moment_;
    advance();
}

void Shared::close(const void* from, size_t bytes) { std::fill_n(writer_.data() + offset(from), bytes, CLOSED); }

void Shared::begin_bulk(int thread, const void* to, size_t bytes, Site site) {
    for (size_t b = 0; b < bytes; b += 16) {
        check_place(thread, static_cast<const std::byte*>(to) + b, 16, site);
        check_fenced(thread, offset(to) + uint32_t(b), 16, "a bulk copy overwrites", site);
        check_write(thread, static_cast<const std::byte*>(to) + b, 16, site);
    }
    std::fill_n(writer_.data() + offset(to), bytes, IN_FLIGHT);
    std::fill_n(memory_ + offset(to), bytes, JUNK);
}

void Shared::finish_bulk(int agent, const std::vector<Piece>& pieces, Clock& to) {
    for (const Piece& piece : pieces) {
        std::copy(piece.data.begin(), piece.data.end(), memory_ + piece.offset);
        std::fill_n(writer_.data() + piece.offset, piece.data.size(), stamp(agent));
    }
    to[agent] = moment_;
    advance();
}

void Shared::check_async_read(int first, const void* from, Site site) {
    check_read(first, from, 16, Reader::lane, site);
    const uint32_t at = offset(from);
    for (int t = first; t < first + WARP; ++t) {
        if (t == first || !suspicious_read<16>(at, stamp(t))) continue;
        explain_read(t, at, 16, Reader::lane, site);
    }
    check_fenced(first, at, 16, "wgmma reads", site);
}

// Ordinary writes reach the asynchronous units only by the writer's fence, whatever barriers came since.
void Shared::check_fenced(int thread, uint32_t at, size_t bytes, const char* what, Site site) const {
    for (uint32_t b = at; b < at + bytes; ++b) {
        const Stamp w = writer_[b];
        const int agent = int(w & AGENT_MASK);
        if (w == UNWRITTEN || w >= CLOSED || agent >= threads_ || w >> AGENT_BITS <= async_fence_[agent]) continue;
        fail(thread, site, "%s shared byte %u, which thread %d wrote without a fence_proxy_async after it", what, b, agent);
    }
}

bool Shared::ordered(Stamp stamp, int thread) const {
    if (stamp <= block_limit_) return true;
    if (stamp >= CLOSED) return false;
    const int agent = int(stamp & AGENT_MASK);
    if (agent == thread) return true;
    if (!clocks_.empty()) return stamp >> AGENT_BITS <= clocks_[thread][agent];
    return agent / WARP == thread / WARP && stamp <= warp_limit_[thread / WARP];
}

Clock Shared::view(int thread) const {
    Clock clock = clocks_.empty() ? Clock(threads_, 0) : clocks_[thread];
    for (uint32_t& moment : clock) moment = std::max(moment, block_limit_ >> AGENT_BITS);
    const int first = thread - thread % WARP;
    for (int t = first; t < first + WARP; ++t) clock[t] = std::max(clock[t], warp_limit_[thread / WARP] >> AGENT_BITS);
    clock[thread] = moment_;
    return clock;
}

std::string Shared::name_of(Stamp stamp) const {
    const int agent = int(stamp & AGENT_MASK);
    return agent < threads_ ? "thread " + std::to_string(agent) : "a bulk copy";
}

void Shared::check_place(int thread, const void* pointer, size_t bytes, Site site) const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer), start = reinterpret_cast<uintptr_t>(memory_);
    if (address < start || address + bytes > start + bytes_) {
        fail(thread, site, "shared access of %zu bytes at offset %lld, outside the block's %zu bytes", bytes,
             static_cast<long long>(address - start), bytes_);
    }
    if (address % bytes != 0) {
        fail(thread, site, "misaligned: shared access of %zu bytes at offset %zu", bytes, size_t(address - start));
    }
}

// The three loops below are the emulator's hottest: no branches, so that the compiler makes vectors of them. What they suspect
// is looked at closely afterwards.
template <size_t BYTES>
bool Shared::suspicious_read(uint32_t offset, Stamp self) const {
    const Stamp* w = writer_.data() + offset;
    bool bad = false;
    for (size_t i = 0; i < BYTES; ++i) {
        bad |= (w[i] == UNWRITTEN) | ((w[i] > block_limit_) & (((w[i] ^ self) & AGENT_MASK) != 0));
    }
    return bad;
}

template <size_t BYTES>
bool Shared::suspicious_write(uint32_t offset, Stamp self) const {
    const Stamp *w = writer_.data() + offset, *r = reader_.data() + offset, *o = other_reader_.data() + offset;
    bool bad = false;
    for (size_t i = 0; i < BYTES; ++i) {
        bad |= (w[i] > block_limit_) & (((w[i] ^ self) & AGENT_MASK) != 0);
        bad |= (r[i] > block_limit_) & (((r[i] ^ self) & AGENT_MASK) != 0);
        bad |= (o[i] > block_limit_) & (((o[i] ^ self) & AGENT_MASK) != 0);
    }
    return bad;
}

template <size_t BYTES>
void Shared::mark_read(uint32_t offset, Stamp self) {
    Stamp *r = reader_.data() + offset, *o = other_reader_.data() + offset;
    for (size_t i = 0; i < BYTES; ++i) {
        o[i] = ((r[i] ^ self) & AGENT_MASK) != 0 ? r[i] : o[i];
        r[i] = self;
    }
}

void Shared::check_read(int thread, const void* from, size_t bytes, Reader reader, Site site) {
    check_place(thread, from, bytes, site);
    const uint32_t at = offset(from);
    const Stamp self = stamp(thread);
    const Stamp owner = reader == Reader::warp ? stamp(NOBODY) : self;
    for_size(bytes, [&](auto size) {
        if (suspicious_read<size>(at, owner)) explain_read(thread, at, bytes, reader, site);
        mark_read<size>(at, self);
    });
}

void Shared::check_write(int thread, const void* to, size_t bytes, Site site) {
    check_place(thread, to, bytes, site);
    const uint32_t at = offset(to);
    const Stamp self = stamp(thread);
    for_size(bytes, [&](auto size) {
        if (suspicious_write<size>(at, self)) explain_write(thread, at, bytes, site);
        std::fill_n(writer_.data() + at, size(), self);
    });
}

// Finds the mistake, if there is one: the quick check knows of block barriers only.
void Shared::explain_read(int thread, uint32_t at, size_t bytes, Reader reader, Site site) const {
    Stamp fine = UNWRITTEN;
    for (uint32_t b = at; b < at + bytes; ++b) {
        const Stamp w = writer_[b];
        if (w == UNWRITTEN) fail(thread, site, "read of shared byte %u, which nobody wrote", b);
        if (w == fine) continue;
        if (w == CLOSED) fail(thread, site, "read of shared byte %u, which belongs to a barrier", b);
        if (w == IN_FLIGHT) explain_flight(thread, b, "read", site);
        if (!ordered(w, thread)) {
            fail(thread, site, "race: read of shared byte %u, which %s wrote with no barrier in between", b,
                 name_of(w).c_str());
        }
        for (int l = 0; l < WARP && reader == Reader::warp; ++l) {
            const int lane = thread - thread % WARP + l;
            if (ordered(w, lane)) continue;
            fail(lane, site, "race: read of shared byte %u by the whole warp, which %s wrote with no barrier in between", b,
                 name_of(w).c_str());
        }
        fine = w;
    }
}

void Shared::explain_write(int thread, uint32_t at, size_t bytes, Site site) const {
    for (uint32_t b = at; b < at + bytes; ++b) {
        if (writer_[b] == CLOSED) fail(thread, site, "write of shared byte %u, which belongs to a barrier", b);
        if (writer_[b] == IN_FLIGHT) explain_flight(thread, b, "write", site);
        if (!ordered(writer_[b], thread)) {
            fail(thread, site, "race: write of shared byte %u, which %s wrote too, with no barrier in between", b,
                 name_of(writer_[b]).c_str());
        }
        for (Stamp r : {reader_[b], other_reader_[b]}) {
            if (ordered(r, thread)) continue;
            fail(thread, site, "race: write of shared byte %u, which %s read with no barrier in between", b,
                 name_of(r).c_str());
        }
    }
}

void Shared::explain_flight(int thread, uint32_t at, const char* what, Site site) const {
    for (size_t t = 0; t < copies_.size(); ++t) {
        for (const Copy& copy : copies_[t].pending) {
            if (at < copy.offset || at >= copy.offset + copy.bytes) continue;
            fail(thread, site, "%s of shared byte %u, to which a copy is in flight: thread %zu has not waited for its line %u",
                 what, at, t, unsigned(copy.site.line()));
        }
    }
    fail(thread, site, "%s of shared byte %u, to which a bulk copy is in flight: its barrier's phase isn't over", what, at);
}

void Shared::begin_copy(int thread, void* to, const void* from, size_t bytes, Site site) {
    check_write(thread, to, bytes, site);
    Copies& copies = copies_[thread];
    Copy& copy = copies.pending.emplace_back();
    copy.offset = offset(to), copy.bytes = uint8_t(bytes), copy.group = copies.groups, copy.site = site;
    if (from != nullptr) memcpy(copy.data, from, bytes);
    std::fill_n(writer_.data() + copy.offset, bytes, IN_FLIGHT);
    std::fill_n(memory_ + copy.offset, bytes, JUNK);
}

void Shared::finish_copies(int thread, int last) {
    Copies& copies = copies_[thread];
    size_t done = 0;
    for (; done < copies.pending.size() && copies.pending[done].group < copies.groups - last; ++done) {
        const Copy& copy = copies.pending[done];
        memcpy(memory_ + copy.offset, copy.data, copy.bytes);
        std::fill_n(writer_.data() + copy.offset, copy.bytes, stamp(thread));
    }
    copies.pending.erase(copies.pending.begin(), copies.pending.begin() + done);
}

// What kernels call

namespace {

void note(Access access, const void* pointer, size_t bytes, Site site) {
    banks.note(machine.thread, access, shared.offset(pointer), int(bytes), block.threads[machine.thread].steady, site);
}

}  // namespace

void read_shared(void* to, const void* from, size_t bytes, Site site) {
    ++measured.operations;
    shared.check_read(machine.thread, from, bytes, Shared::Reader::lane, site);
    note(Access::load, from, bytes, site);
    memcpy(to, from, bytes);
}

void write_shared(void* to, const void* from, size_t bytes, Site site) {
    ++measured.operations;
    shared.check_write(machine.thread, to, bytes, site);
    note(Access::store, to, bytes, site);
    memcpy(to, from, bytes);
}

void copy_async(void* to, const void* from, int bytes, bool wanted, Site site) {
    ++measured.operations;
    if (wanted) global.check_read(machine.thread, from, bytes, bytes, Global::Reading::ordinary, site);
    shared.begin_copy(machine.thread, to, wanted ? from : nullptr, bytes, site);
    note(Access::copy, to, bytes, site);
}

void copy_async_commit() { shared.commit_copies(machine.thread); }
void copy_async_wait(int last) { shared.finish_copies(machine.thread, last); }

}  // namespace simt

// Shared memory, and beside every byte who wrote and read it last: what a thread may touch depends on the barriers in between.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

// Bytes on their way, and where they go.
struct Piece {
    uint32_t offset;
    std::vector<std::byte> data;
};

// Where the 128-byte swizzle puts a byte: its 16-byte piece, bits 4..6, is exchanged by the row, bits 7..9.
inline uint64_t swizzle(uint64_t offset, bool swizzled) { return swizzled ? offset ^ (offset >> 7 & 7) << 4 : offset; }

// An access is stamped with a moment and an agent. Moments count the synchronisations of the block so far; an access is ordered
// before a thread's present if the thread did it itself, if a block barrier or its own warp's came after its moment, or, by the
// thread's clock, if the thread has waited for something that came after it. Agents are the threads, and after them the
// barriers in shared memory, in whose name bulk copies write: their data is seen by those who wait for the barrier, and not by
// the issuer.
using Clock = std::vector<uint32_t>;  // by agent: the moment up to which its accesses are ordered

class Shared {
public:
    using Stamp = uint32_t;
    std::byte* begin_launch(size_t bytes, int threads);
    void begin_block();

    // A whole warp reads where one lane points: even the lane's own write must be ordered then.
    enum class Reader { lane, warp };
    void check_read(int thread, const void* from, size_t bytes, Reader reader, Site site);
    void check_write(int thread, const void* to, size_t bytes, Site site);
    uint32_t offset(const void* pointer) const { return uint32_t(static_cast<const std::byte*>(pointer) - memory_); }

    void begin_copy(int thread, void* to, const void* from, size_t bytes, Site site);  // from: nullptr for zeros
    void commit_copies(int thread) { ++copies_[thread].groups; }
    void finish_copies(int thread, int last);

    void order_block();         // a block barrier has been passed
    void order_warp(int warp);  // sync_warp has been passed
    void order_group(const std::vector<int>& threads);
    int new_agent();            // and from now on there are clocks
    void release(int thread, Clock& to);
    void acquire(int thread, const Clock& from);
    void fence_async(int thread);

    // Bytes of a barrier: nobody reads or writes them.
    void close(const void* from, size_t bytes);
    // A bulk copy of whole 16 bytes: begun by a thread, delivered in an agent's name, which `to` then knows.
    void begin_bulk(int thread, const void* to, size_t bytes, Site site);
    void finish_bulk(int agent, const std::vector<Piece>& pieces, Clock& to);
    // 16 bytes that wgmma reads for the threads [first, first + 32).
    void check_async_read(int first, const void* from, Site site);

    Stamp stamp(int agent) const { return moment_ << AGENT_BITS | Stamp(agent); }
    bool ordered(Stamp stamp, int thread) const;
    // All that is ordered before a thread's present, for other blocks to know; whether a stamp is part of it.
    Clock view(int thread) const;
    static bool within(Stamp stamp, const Clock& view) { return stamp >> AGENT_BITS <= view[stamp & AGENT_MASK]; }
    std::string name_of(Stamp stamp) const;
    void advance();

private:
    static constexpr int AGENT_BITS = 11;
    static constexpr Stamp AGENT_MASK = (1u << AGENT_BITS) - 1, UNWRITTEN = 0, IN_FLIGHT = ~0u, CLOSED = ~0u - 1;
    static constexpr int NOBODY = AGENT_MASK - 2;  // compared with it, no write is one's own

    struct Copy {
        uint32_t offset;
        uint8_t bytes;
        int group;
        std::byte data[16];
        Site site;
    };
    struct Copies {
        std::vector<Copy> pending;
        int groups = 0;  // closed so far
    };

    void check_place(int thread, const void* pointer, size_t bytes, Site site) const;
    template <size_t BYTES>
    bool suspicious_read(uint32_t offset, Stamp self) const;
    template <size_t BYTES>
    bool suspicious_write(uint32_t offset, Stamp self) const;
    template <size_t BYTES>
    void mark_read(uint32_t offset, Stamp self);
    void explain_read(int thread, uint32_t offset, size_t bytes, Reader reader, Site site) const;
    void explain_write(int thread, uint32_t offset, size_t bytes, Site site) const;
    void check_fenced(int thread, uint32_t offset, size_t bytes, const char* what, Site site) const;
    void explain_flight(int thread, uint32_t offset, const char* what, Site site) const;
    void start_clocks();

    std::unique_ptr<std::byte[]> storage_;
    std::byte* memory_ = nullptr;
    size_t bytes_ = 0;
    // By byte: the last write, the last read, and the last read by another agent than that one.
    std::vector<Stamp> writer_, reader_, other_reader_;
    uint32_t moment_ = 1;
    Stamp block_limit_ = 0;               // up to here everything is ordered for everybody
    std::vector<Stamp> warp_limit_;       // and for the lanes of a warp among themselves
    std::vector<Copies> copies_;
    std::vector<Clock> clocks_;           // by thread; empty until something needs them
    std::vector<uint32_t> async_fence_;   // by thread: the moment of its last fence_proxy_async
    int threads_ = 0, agents_ = 0, most_agents_ = 0;
};
extern Shared shared;

}  // namespace simt

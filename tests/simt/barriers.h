// Barriers in shared memory, their phases, and the bulk copies that report to them.
#pragma once

#include <map>
#include <vector>

#include "shared.h"

namespace simt {

class Barriers {
public:
    void begin_block() { barriers_.clear(); }
    void end_block() const;
    // For the report of a deadlock: what the current phases lack.
    std::string unfinished() const;

    void init(int thread, uint64_t* place, int arrivals, Site site);
    void init_fence(int thread);
    void arrive(int thread, uint64_t* place, int bytes, Site site);
    void wait(int thread, uint64_t* place, int parity, Site site);
    // A copy to the contiguous bytes at `to`.
    void copy(int thread, uint64_t* place, void* to, std::vector<std::byte> data, Site site);

private:
    struct Waiter {
        int thread, parity;
    };
    struct State {
        int arrivals, pending, agent;
        int phase = 0;
        int64_t expected = 0, brought = 0;  // bytes of the current phase
        Shared::Stamp prepared;
        int preparer;
        bool fenced = false;  // copies may use it
        Clock gathering, released;
        std::vector<Piece> flying;
        std::vector<Waiter> waiters;
    };
    std::map<uint32_t, State> barriers_;  // by offset

    State& find(int thread, const uint64_t* place, Site site);
    void settle(int thread, State& state, Site site);
};
extern Barriers barriers;

}  // namespace simt

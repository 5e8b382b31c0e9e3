// How often shared memory's 32 banks of 4 bytes are visited, and how often too often.
#pragma once

#include <vector>

#include "simt.h"

namespace simt {

class Banks {
public:
    void begin_block(int warps);
    // One lane's access; it is compared with those of the other lanes at the next flush.
    void note(int thread, Access access, uint32_t offset, int bytes, bool steady, Site site);
    // The accesses of a warp since the last flush are complete: pairs them up, lane by lane, and counts.
    void flush(int warp);
    // Matrices of 8 rows of 16 bytes, whose rows come together by construction.
    void count_matrices(const uint32_t* rows, int matrices, bool steady);

private:
    struct Entry {
        uint32_t offset;
        uint8_t bytes;
        Access access;
        bool steady;
        Site site;
    };
    std::vector<std::vector<Entry>> lanes_;  // by thread
    std::vector<int64_t> overrun_;           // by warp: accesses that were dropped

    static void count(const Entry* const (&lane_entries)[WARP]);
    void flush_apart(int warp, size_t from);
};
extern Banks banks;

}  // namespace simt

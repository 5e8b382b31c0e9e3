// The products of warpgroups: when they were started, and what nobody may touch until they are waited for.
#pragma once

#include <array>
#include <map>
#include <vector>

#include "block.h"

namespace simt {

class Products {
public:
    void begin_block(int warps) { warps_.assign(warps, WarpState()); }
    void end_block() const;
    void fence(int warp);
    void commit(int warp);
    void wait(int warp, int last, Site site);

    struct Issue {
        Kind kind;
        int columns;
        float* d;
        const uint32_t* a;
        uint64_t descriptor;
        Site site;
    };
    // What the 32 lanes of a warp start, with B's bytes as they are now, column after column.
    void start(int warp, const Issue* const (&lanes)[WARP], const std::vector<std::byte>& b);

private:
    using Registers = std::array<uint32_t, 4>;
    struct Lane {
        float* d;
        const uint32_t* a;
        Registers held;           // what a contained
        std::vector<float> sums;  // what d will contain
    };
    struct Started {
        int group;
        uint64_t descriptor;
        int columns;
        std::vector<std::byte> b;
        Lane lanes[WARP];
        Site site;
    };
    struct WarpState {
        std::vector<Started> started;
        int groups = 0;
        bool fenced = false;
        std::map<const uint32_t*, Registers> at_fence;  // A registers that earlier products used, as they were at the fence
    };
    std::vector<WarpState> warps_;

    void finish(int warp, size_t index, Site site);
};
extern Products products;

}  // namespace simt

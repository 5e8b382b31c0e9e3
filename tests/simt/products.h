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

    enum class Element { half, bf16, e4m3 };
    // a: registers, or null where A lies in shared memory too
    struct Issue {
        Element element;
        int columns;
        float* d;
        const uint32_t* a;
        uint64_t a_descriptor, b_descriptor;
        Site site;
    };
    // What a warp reads of an operand in shared memory: rows of 32 bytes, a step along K, with their bytes as they were.
    struct Rows {
        const char* name;
        uint64_t descriptor;
        int first, count;
        std::vector<std::byte> bytes;
    };
    // What the 32 lanes of a warp start. A's rows are empty where A is in registers.
    void start(int warp, const Issue* const (&lanes)[WARP], Rows a, Rows b);

private:
    using Registers = std::array<uint32_t, 4>;
    struct Lane {
        float* d;
        const uint32_t* a;        // null: in shared memory
        Registers held;           // what a contained
        std::vector<float> sums;  // what d will contain
    };
    struct Started {
        int group;
        Rows a, b;
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

    Lane start_lane(int warp, int lane, const Issue& issue);
    void finish(int warp, size_t index, Site site);
};
extern Products products;

}  // namespace simt

#include "products.h"

#include <algorithm>

#include "shared.h"
#include "simt90.h"

namespace simt {

Products products;
namespace {

constexpr int ROWS = 16, DEPTH = 16;           // of one warp's part
constexpr size_t COLUMN_BYTES = DEPTH * 2;     // of B
constexpr uint32_t POISON_BITS = 0xFFFFDEAD;   // a NaN: sums look so until they are waited for

bool poisoned(const float* d, size_t count) {
    return std::all_of(d, d + count, [](float f) { return same_bits<uint32_t>(f) == POISON_BITS; });
}

std::array<uint32_t, 4> contents(const uint32_t* a) { return {a[0], a[1], a[2], a[3]}; }

// Where piece `piece` of 8 numbers of column n lies, by the descriptor.
const std::byte* column_piece(uint64_t descriptor, int n, int piece) {
    const uint64_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    return machine.shared + swizzle(start + n / 8 * stride + n % 8 * 128 + 16 * piece, true);
}

void check_descriptor(uint64_t descriptor, int thread, Site site) {
    const auto field = [&](int from, int bits) { return descriptor >> from & ((uint64_t(1) << bits) - 1); };
    if (field(62, 2) != 1) fail(thread, site, "the emulator knows wgmma descriptors of the 128-byte swizzle only");
    if (field(49, 3) != 0 || field(32, 14) % 64 != 0) {
        fail(thread, site, "the emulator knows wgmma descriptors of tiles at multiples of 1024 bytes only");
    }
    const uint64_t within = (descriptor << 4) % 128;
    if ((descriptor << 4) % 1024 != within || within % 32 != 0) {
        fail(thread, site, "a wgmma descriptor begins %d bytes after a multiple of 1024: steps along K are 32 bytes within 128",
             int((descriptor << 4) % 1024));
    }
}

// The 128 threads agree on B; each warp multiplies its 16 rows.
void start_for_warpgroup(void* const* arguments) {
    const auto issue = [&](int t) { return static_cast<const Products::Issue*>(arguments[t]); };
    const int first = machine.thread - machine.thread % WARPGROUP;
    const Products::Issue& any = *issue(0);
    check_descriptor(any.descriptor, first, any.site);
    for (int t = 1; t < WARPGROUP; ++t) {
        if (issue(t)->descriptor != any.descriptor) fail(first + t, any.site, "wgmma: the warpgroup's descriptors differ");
    }
    std::vector<std::byte> b(any.columns * COLUMN_BYTES);
    for (int w = 0; w < WARPGROUP / WARP; ++w) {
        for (int n = 0; n < any.columns; ++n) {
            for (int piece = 0; piece < 2; ++piece) {
                const std::byte* from = column_piece(any.descriptor, n, piece);
                shared.check_async_read(first + w * WARP, from, any.site);
                memcpy(b.data() + n * COLUMN_BYTES + 16 * piece, from, 16);
            }
        }
    }
    for (int w = 0; w < WARPGROUP / WARP; ++w) {
        const Products::Issue* lanes[WARP];
        for (int l = 0; l < WARP; ++l) lanes[l] = issue(w * WARP + l);
        products.start(first / WARP + w, lanes, b);
    }
}

}  // namespace

void Products::end_block() const {
    for (size_t w = 0; w < warps_.size(); ++w) {
        if (!warps_[w].started.empty()) fail(int(w) * WARP, warps_[w].started[0].site, "the warp ends without wgmma_wait");
    }
}

void Products::fence(int warp) {
    WarpState& state = warps_[warp];
    state.fenced = true;
    for (auto& [a, held] : state.at_fence) held = contents(a);
}

void Products::commit(int warp) {
    ++warps_[warp].groups;
    warps_[warp].fenced = false;
}

void Products::start(int warp, const Issue* const (&lanes)[WARP], const std::vector<std::byte>& b) {
    WarpState& state = warps_[warp];
    const Issue& any = *lanes[0];
    const int first = warp * WARP, count = any.columns / 2;
    if (!state.fenced) fail(first, any.site, "wgmma without a wgmma_fence since the last wgmma_commit or wgmma_wait");
    Started started{state.groups, any.descriptor, any.columns, b, {}, any.site};
    float a[ROWS][DEPTH];
    for (int l = 0; l < WARP; ++l) {
        const Issue& issue = *lanes[l];
        Lane& lane = started.lanes[l];
        lane.d = issue.d, lane.a = issue.a, lane.held = contents(issue.a);
        const auto known = state.at_fence.find(issue.a);
        if (known != state.at_fence.end() && known->second != lane.held) {
            fail(first + l, issue.site, "A registers of wgmma were written after the wgmma_fence");
        }
        state.at_fence[issue.a] = lane.held;
        const auto before = std::find_if(state.started.rbegin(), state.started.rend(),
                                         [&](const Started& each) { return each.lanes[l].d == issue.d; });
        if (before == state.started.rend()) {
            lane.sums.assign(issue.d, issue.d + count);
        } else {
            if (!poisoned(issue.d, count)) fail(first + l, any.site, "the sums of a wgmma were touched before its wgmma_wait");
            lane.sums = before->lanes[l].sums;
        }
        std::fill_n(issue.d, count, same_bits<float>(POISON_BITS));
        for (int i = 0; i < 4; ++i) {
            float* pair = &a[l / 4 + i % 2 * 8][l % 4 * 2 + i / 2 * 8];
            pair[0] = widen(any.kind, uint16_t(lane.held[i])), pair[1] = widen(any.kind, uint16_t(lane.held[i] >> 16));
        }
    }
    for (int n = 0; n < any.columns; ++n) {
        float column[DEPTH];
        for (int k = 0; k < DEPTH; ++k) {
            uint16_t bits;
            memcpy(&bits, b.data() + n * COLUMN_BYTES + 2 * k, sizeof(bits));
            column[k] = widen(any.kind, bits);
        }
        for (int m = 0; m < ROWS; ++m) {
            float& held = started.lanes[m % 8 * 4 + n % 8 / 2].sums[n / 8 * 4 + m / 8 * 2 + n % 2];
            double sum = held;
            for (int k = 0; k < DEPTH; ++k) sum += double(a[m][k]) * double(column[k]);
            held = float(sum);
        }
    }
    state.started.push_back(std::move(started));
}

void Products::wait(int warp, int last, Site site) {
    WarpState& state = warps_[warp];
    size_t done = 0;
    while (done < state.started.size() && state.started[done].group < state.groups - last) finish(warp, done++, site);
    state.started.erase(state.started.begin(), state.started.begin() + done);
    state.fenced = false;
}

// One product is complete: what it read must be what it was, and its sums appear unless a later product goes on with them.
void Products::finish(int warp, size_t index, Site site) {
    const WarpState& state = warps_[warp];
    const Started& self = state.started[index];
    const int first = warp * WARP;
    const unsigned line = self.site.line();
    for (int n = 0; n < self.columns; ++n) {
        for (int piece = 0; piece < 2; ++piece) {
            const std::byte* from = column_piece(self.descriptor, n, piece);
            shared.check_async_read(first, from, site);
            if (memcmp(from, self.b.data() + n * COLUMN_BYTES + 16 * piece, 16) == 0) continue;
            fail(first, site, "the B of the wgmma at line %u was overwritten before its wgmma_wait, shared byte %u", line,
                 shared.offset(from));
        }
    }
    for (int l = 0; l < WARP; ++l) {
        const Lane& lane = self.lanes[l];
        if (contents(lane.a) != lane.held) {
            fail(first + l, site, "the A registers of the wgmma at line %u were written, or ended, before its wgmma_wait",
                 line);
        }
        const bool goes_on = std::any_of(state.started.begin() + index + 1, state.started.end(),
                                         [&](const Started& later) { return later.lanes[l].d == lane.d; });
        if (goes_on) continue;
        if (!poisoned(lane.d, lane.sums.size())) {
            fail(first + l, site, "the sums of the wgmma at line %u were touched before its wgmma_wait", line);
        }
        std::copy(lane.sums.begin(), lane.sums.end(), lane.d);
    }
}

// What kernels call

uint64_t shared_offset(const void* pointer) { return shared.offset(pointer); }

void wgmma(Kind kind, int columns, float* d, const uint32_t* a, uint64_t descriptor, Site site) {
    Products::Issue self = {kind, columns, d, a, descriptor, site};
    warpgroup_collective("wgmma", site, &self, start_for_warpgroup);
}

void wgmma_fence(Site site) {
    collective("wgmma_fence", site, nullptr, [](void* const*) { products.fence(machine.thread / WARP); });
}

void wgmma_commit(Site site) {
    collective("wgmma_commit", site, nullptr, [](void* const*) { products.commit(machine.thread / WARP); });
}

void wgmma_wait(int last, Site site) {
    struct Wait {
        int last;
        Site site;
    };
    Wait self = {last, site};
    collective("wgmma_wait", site, &self, [](void* const* lanes) {
        const Wait& wait = *static_cast<Wait*>(lanes[0]);
        products.wait(machine.thread / WARP, wait.last, wait.site);
        // The warp's reads of B are over for all of its lanes: any of them may say so to whoever fills the stage again.
        shared.order_warp(machine.thread / WARP);
    });
}

bool elect(Site site) {
    collective("elect", site, nullptr, [](void* const*) {});
    return machine.thread % WARP == (reversed() ? WARP - 1 : 0);
}

}  // namespace simt

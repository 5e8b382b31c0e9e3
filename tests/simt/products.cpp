#include "products.h"

#include <algorithm>
#include <utility>

#include "shared.h"
#include "simt90.h"

namespace simt {

Products products;
namespace {

constexpr int ROWS = 16, MOST_DEPTH = 32;      // of one warp's part
constexpr size_t ROW_BYTES = 32;               // of a step along K, whatever the numbers are
constexpr uint32_t POISON_BITS = 0xFFFFDEAD;   // a NaN: sums look so until they are waited for

bool poisoned(const float* d, size_t count) {
    return std::all_of(d, d + count, [](float f) { return same_bits<uint32_t>(f) == POISON_BITS; });
}

std::array<uint32_t, 4> contents(const uint32_t* a) { return {a[0], a[1], a[2], a[3]}; }

// Where piece `piece` of 16 bytes of row n lies, by the descriptor.
const std::byte* row_piece(uint64_t descriptor, int n, int piece) {
    const uint64_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    return machine.shared + swizzle(start + n / 8 * stride + n % 8 * 128 + 16 * piece, true);
}

// Calls function(piece in shared memory, its place among the rows' bytes) for all of an operand's rows.
template <class Function>
void for_pieces(const Products::Rows& rows, Function function) {
    for (int n = 0; n < rows.count; ++n) {
        for (int piece = 0; piece < 2; ++piece) {
            function(row_piece(rows.descriptor, rows.first + n, piece), n * ROW_BYTES + 16 * piece);
        }
    }
}

// As the warp of thread `first` reads them now.
Products::Rows read_rows(const char* name, uint64_t descriptor, int first_row, int count, int first, Site site) {
    Products::Rows rows = {name, descriptor, first_row, count, std::vector<std::byte>(count * ROW_BYTES)};
    for_pieces(rows, [&](const std::byte* from, size_t place) {
        shared.check_async_read(first, from, site);
        memcpy(rows.bytes.data() + place, from, 16);
    });
    return rows;
}

int depth_of(Products::Element element) { return element == Products::Element::e4m3 ? 32 : 16; }

std::array<float, 256> all_of_e4m3() {
    std::array<float, 256> numbers;
    for (int code = 0; code < 256; ++code) numbers[code] = widen_e4m3(uint8_t(code));
    return numbers;
}

// The numbers of one row.
void widen_row(Products::Element element, const std::byte* row, float (&to)[MOST_DEPTH]) {
    static const std::array<float, 256> E4M3 = all_of_e4m3();
    for (int k = 0; k < depth_of(element); ++k) {
        if (element == Products::Element::e4m3) {
            to[k] = E4M3[uint8_t(row[k])];
        } else {
            uint16_t bits;
            memcpy(&bits, row + 2 * k, sizeof(bits));
            to[k] = widen(element == Products::Element::half ? Kind::half : Kind::bf16, bits);
        }
    }
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

// The 128 threads agree on what lies in shared memory; each warp multiplies its 16 rows.
void start_for_warpgroup(void* const* arguments) {
    const auto issue = [&](int t) { return static_cast<const Products::Issue*>(arguments[t]); };
    const int first = machine.thread - machine.thread % WARPGROUP;
    const Products::Issue& any = *issue(0);
    check_descriptor(any.b_descriptor, first, any.site);
    if (any.a == nullptr) check_descriptor(any.a_descriptor, first, any.site);
    for (int t = 1; t < WARPGROUP; ++t) {
        if (issue(t)->b_descriptor == any.b_descriptor && issue(t)->a_descriptor == any.a_descriptor) continue;
        fail(first + t, any.site, "wgmma: the warpgroup's descriptors differ");
    }
    for (int w = 0; w < WARPGROUP / WARP; ++w) {
        const Products::Issue* lanes[WARP];
        for (int l = 0; l < WARP; ++l) lanes[l] = issue(w * WARP + l);
        const int thread = first + w * WARP, rows = any.a == nullptr ? ROWS : 0;
        products.start(thread / WARP, lanes, read_rows("A", any.a_descriptor, w * ROWS, rows, thread, any.site),
                       read_rows("B", any.b_descriptor, 0, any.columns, thread, any.site));
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

// A lane's registers as they are now; its sums are from now on for nobody to touch.
Products::Lane Products::start_lane(int warp, int l, const Issue& issue) {
    WarpState& state = warps_[warp];
    const int thread = warp * WARP + l, count = issue.columns / 2;
    Lane lane = {issue.d, issue.a, {}, {}};
    if (issue.a != nullptr) {
        lane.held = contents(issue.a);
        const auto known = state.at_fence.find(issue.a);
        if (known != state.at_fence.end() && known->second != lane.held) {
            fail(thread, issue.site, "A registers of wgmma were written after the wgmma_fence");
        }
        state.at_fence[issue.a] = lane.held;
    }
    const auto before = std::find_if(state.started.rbegin(), state.started.rend(),
                                     [&](const Started& each) { return each.lanes[l].d == issue.d; });
    if (before == state.started.rend()) {
        lane.sums.assign(issue.d, issue.d + count);
    } else {
        if (!poisoned(issue.d, count)) fail(thread, issue.site, "the sums of a wgmma were touched before its wgmma_wait");
        lane.sums = before->lanes[l].sums;
    }
    std::fill_n(issue.d, count, same_bits<float>(POISON_BITS));
    return lane;
}

void Products::start(int warp, const Issue* const (&lanes)[WARP], Rows a_rows, Rows b_rows) {
    WarpState& state = warps_[warp];
    const Issue& any = *lanes[0];
    const bool eight_bits = any.element == Element::e4m3;
    if (!state.fenced) fail(warp * WARP, any.site, "wgmma without a wgmma_fence since the last wgmma_commit or wgmma_wait");
    Started started{state.groups, std::move(a_rows), std::move(b_rows), {}, any.site};
    for (int l = 0; l < WARP; ++l) started.lanes[l] = start_lane(warp, l, *lanes[l]);
    float a[ROWS][MOST_DEPTH];
    for (int m = 0; m < ROWS; ++m) {
        if (any.a == nullptr) {
            widen_row(any.element, started.a.bytes.data() + m * ROW_BYTES, a[m]);
            continue;
        }
        // Lane 4 r + q holds columns 2 q, 2 q + 1 of rows r and r + 8, and the same eight columns further.
        uint32_t words[8];
        for (int i = 0; i < 8; ++i) words[i] = started.lanes[m % 8 * 4 + i % 4].held[i / 4 * 2 + m / 8];
        widen_row(any.element, reinterpret_cast<const std::byte*>(words), a[m]);
    }
    for (int n = 0; n < any.columns; ++n) {
        float column[MOST_DEPTH];
        widen_row(any.element, started.b.bytes.data() + n * ROW_BYTES, column);
        for (int m = 0; m < ROWS; ++m) {
            float& held = started.lanes[m % 8 * 4 + n % 8 / 2].sums[n / 8 * 4 + m / 8 * 2 + n % 2];
            double sum = held;
            for (int k = 0; k < depth_of(any.element); ++k) sum += double(a[m][k]) * double(column[k]);
            held = eight_bits ? cut_to_13(sum) : float(sum);
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
    for (const Rows* rows : {&self.a, &self.b}) {
        for_pieces(*rows, [&](const std::byte* from, size_t place) {
            shared.check_async_read(first, from, site);
            if (memcmp(from, rows->bytes.data() + place, 16) == 0) return;
            fail(first, site, "the %s of the wgmma at line %u was overwritten before its wgmma_wait, shared byte %u",
                 rows->name, line, shared.offset(from));
        });
    }
    for (int l = 0; l < WARP; ++l) {
        const Lane& lane = self.lanes[l];
        if (lane.a != nullptr && contents(lane.a) != lane.held) {
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
    const Products::Element element = kind == Kind::half ? Products::Element::half : Products::Element::bf16;
    Products::Issue self = {element, columns, d, a, 0, descriptor, site};
    warpgroup_collective("wgmma", site, &self, start_for_warpgroup);
}

void wgmma_e4m3(int columns, float* d, uint64_t a, uint64_t b, Site site) {
    Products::Issue self = {Products::Element::e4m3, columns, d, nullptr, a, b, site};
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
        // The warp's reads of A and B are over for all of its lanes: any of them may say so to whoever fills the stage again.
        shared.order_warp(machine.thread / WARP);
    });
}

bool elect(Site site) {
    collective("elect", site, nullptr, [](void* const*) {});
    return machine.thread % WARP == (reversed() ? WARP - 1 : 0);
}

}  // namespace simt

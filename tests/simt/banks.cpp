#include "banks.h"

#include <algorithm>
#include <map>
#include <utility>

namespace simt {

Banks banks;
namespace {

constexpr int BANKS = 32, BANK_BYTES = 4;
constexpr size_t MOST_ENTRIES = 1 << 14;  // of a lane between two meetings of its warp

// Lanes that want the same word share a trip; a trip brings one word of each bank.
int trips(const uint32_t* offsets, int count, int bytes) {
    uint32_t words[BANKS][WARP];
    uint8_t filled[BANKS] = {};
    uint8_t most = 0;
    for (int i = 0; i < count; ++i) {
        for (int b = 0; b < bytes; b += BANK_BYTES) {
            const uint32_t word = (offsets[i] + b) / BANK_BYTES, bank = word % BANKS;
            uint32_t* end = words[bank] + filled[bank];
            if (std::find(words[bank], end, word) != end) continue;
            *end = word;
            most = std::max(most, ++filled[bank]);
        }
    }
    return most;
}

void add(Access access, bool steady, int wavefronts, int fewest) {
    const auto add_to = [&](Traffic& traffic) {
        ++traffic.accesses;
        traffic.wavefronts += wavefronts;
        traffic.conflicts += wavefronts - fewest;
    };
    add_to(measured.all[int(access)]);
    if (steady) add_to(measured.steady[int(access)]);
}

bool same_site(const Site& a, const Site& b) { return a.line() == b.line() && a.column() == b.column(); }

}  // namespace

void Banks::begin_block(int warps) {
    lanes_.resize(warps * WARP);
    for (auto& entries : lanes_) entries.clear();
    overrun_.assign(warps, 0);
}

void Banks::note(int thread, Access access, uint32_t offset, int bytes, bool steady, Site site) {
    std::vector<Entry>& entries = lanes_[thread];
    if (entries.size() == MOST_ENTRIES) {
        ++overrun_[thread / WARP];
        return;
    }
    entries.push_back({offset, uint8_t(bytes), access, steady, site});
}

// One instruction of a warp: `lane_entries` holds what each lane of 32 did, nullptr where it did nothing. 4 bytes a lane, or
// fewer, go out together; of 8 bytes half a warp at a time, of 16 a quarter.
void Banks::count(const Entry* const (&lane_entries)[WARP]) {
    const Entry* some = *std::find_if(lane_entries, lane_entries + WARP, [](const Entry* e) { return e != nullptr; });
    const int lanes_at_once = WARP / std::max(1, some->bytes / BANK_BYTES);
    int wavefronts = 0, fewest = 0;
    for (int first = 0; first < WARP; first += lanes_at_once) {
        uint32_t offsets[WARP];
        int count = 0;
        for (int l = first; l < first + lanes_at_once; ++l) {
            if (lane_entries[l] != nullptr) offsets[count++] = lane_entries[l]->offset;
        }
        wavefronts += trips(offsets, count, some->bytes);
        fewest += count != 0;
    }
    add(some->access, some->steady, wavefronts, fewest);
}

void Banks::flush(int warp) {
    const std::vector<Entry>* lanes = &lanes_[warp * WARP];
    size_t common = lanes[0].size();
    for (int l = 1; l < WARP; ++l) common = std::min(common, lanes[l].size());
    // While the lanes did the same in the same order, their n-th accesses are one instruction.
    size_t done = 0;
    for (; done < common; ++done) {
        const Entry* together[WARP];
        bool alike = true;
        for (int l = 0; l < WARP; ++l) {
            together[l] = &lanes[l][done];
            alike &= same_site(together[l]->site, lanes[0][done].site) && together[l]->bytes == lanes[0][done].bytes;
        }
        if (!alike) break;
        count(together);
    }
    flush_apart(warp, done);
    measured.uncounted += std::exchange(overrun_[warp], 0);
    for (int l = 0; l < WARP; ++l) lanes_[warp * WARP + l].clear();
}

// Where some lanes skip accesses, those at one place in the source belong together by how often each lane has been there.
void Banks::flush_apart(int warp, size_t from) {
    struct Instruction {
        const Entry* lanes[WARP] = {};
    };
    using Place = std::pair<uint64_t, int>;
    std::map<std::pair<Place, int>, Instruction> instructions;
    for (int l = 0; l < WARP; ++l) {
        std::map<Place, int> visits;
        const std::vector<Entry>& entries = lanes_[warp * WARP + l];
        for (size_t i = from; i < entries.size(); ++i) {
            const Entry& entry = entries[i];
            const Place place = {uint64_t(entry.site.line()) << 32 | entry.site.column(), entry.bytes};
            instructions[{place, visits[place]++}].lanes[l] = &entry;
        }
    }
    for (const auto& [key, instruction] : instructions) count(instruction.lanes);
}

void Banks::count_matrices(const uint32_t* rows, int matrices, bool steady) {
    int wavefronts = 0;
    for (int m = 0; m < matrices; ++m) wavefronts += trips(rows + 8 * m, 8, 16);
    add(Access::matrix, steady, wavefronts, matrices);
}

}  // namespace simt

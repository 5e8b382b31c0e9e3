// What the 32 lanes of a warp do together: shuffles, matrices from shared memory, products of matrices.
#include <utility>

#include "banks.h"
#include "block.h"
#include "shared.h"

namespace simt {

namespace {

struct Shuffle {
    uint32_t bits;
    int from;
    uint32_t result;
};

uint32_t shuffle_from(const char* name, uint32_t bits, int from, Site site) {
    if (from < 0 || from >= WARP) fail(machine.thread, site, "%s: there is no lane %d", name, from);
    Shuffle self = {bits, from, 0};
    collective(name, site, &self, [](void* const* lanes) {
        for (int l = 0; l < WARP; ++l) {
            Shuffle& each = *static_cast<Shuffle*>(lanes[l]);
            each.result = static_cast<Shuffle*>(lanes[each.from])->bits;
        }
    });
    return self.result;
}

struct Matrices {
    uint32_t* r;
    int count;
    bool trans;
    const void* row;
    Site site;
};

void load_for_warp(void* const* lanes) {
    const int first = machine.thread - machine.thread % WARP;
    const auto lane = [&](int l) -> Matrices& { return *static_cast<Matrices*>(lanes[l]); };
    const int count = lane(0).count;
    uint32_t rows[WARP];
    for (int l = 0; l < 8 * count; ++l) {
        shared.check_read(first + l, lane(l).row, 16, Shared::Reader::warp, lane(l).site);
        rows[l] = shared.offset(lane(l).row);
    }
    banks.count_matrices(rows, count, block.threads[machine.thread].steady);
    for (int l = 0; l < WARP; ++l) {
        const int g = l / 4, t = l % 4;
        for (int m = 0; m < count; ++m) {
            const auto number = [&](int row, int column) -> uint32_t {
                uint16_t bits;
                memcpy(&bits, static_cast<const std::byte*>(lane(8 * m + row).row) + 2 * column, sizeof(bits));
                return bits;
            };
            lane(l).r[m] = lane(l).trans ? number(2 * t, g) | number(2 * t + 1, g) << 16
                                         : number(g, 2 * t) | number(g, 2 * t + 1) << 16;
        }
    }
}

struct Product {
    Kind kind;
    float* d;
    const uint32_t *a, *b;
};

// The sums are made in fp64 and rounded once: closer to the exact result than the tensor core, which also truncates.
void multiply_for_warp(void* const* lanes) {
    float a[16][16], b[16][8];
    const Kind kind = static_cast<Product*>(lanes[0])->kind;
    const auto unpack = [&](uint32_t pair, float& lo, float& hi) {
        lo = widen(kind, uint16_t(pair)), hi = widen(kind, uint16_t(pair >> 16));
    };
    for (int l = 0; l < WARP; ++l) {
        const Product& each = *static_cast<Product*>(lanes[l]);
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; ++i) {
            const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
            unpack(each.a[i], a[row][column], a[row][column + 1]);
        }
        for (int i = 0; i < 2; ++i) unpack(each.b[i], b[2 * t + 8 * i][g], b[2 * t + 8 * i + 1][g]);
    }
    double d[16][8];
    const auto for_accumulators = [&](auto function) {
        for (int l = 0; l < WARP; ++l) {
            for (int i = 0; i < 4; ++i) {
                function(static_cast<Product*>(lanes[l])->d[i], d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
            }
        }
    };
    for_accumulators([](float& held, double& sum) { sum = held; });
    for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 8; ++n) d[m][n] += double(a[m][k]) * double(b[k][n]);
        }
    }
    for_accumulators([](float& held, double& sum) { held = float(sum); });
}

}  // namespace

void sync_warp(Site site) {
    collective("sync_warp", site, nullptr, [](void* const*) { shared.order_warp(machine.thread / WARP); });
}

uint32_t shuffle_bits(uint32_t bits, int lane, Site site) { return shuffle_from("shuffle", bits, lane, site); }

uint32_t shuffle_xor_bits(uint32_t bits, int mask, Site site) {
    return shuffle_from("shuffle_xor", bits, machine.thread % WARP ^ mask, site);
}

void load_matrices(uint32_t* r, int count, bool trans, const void* row, Site site) {
    Matrices self = {r, count, trans, row, site};
    collective("load_matrix", site, &self, load_for_warp);
}

void mma_16816(Kind kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
    Product self = {kind, d, a, b};
    collective("mma_16816", site, &self, multiply_for_warp);
}

}  // namespace simt

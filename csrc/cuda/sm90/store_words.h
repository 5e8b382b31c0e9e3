// Rows of y, 16-bit numbers, from registers in which neighbouring lanes hold pieces of one row.
#pragma once

#include "../common/ptx.h"

namespace quantlib::cuda {

// y [m_end, n_end] whose rows begin at multiples of 8 bytes. Lane 4 r + q holds, of the row m that belongs to r, columns 2 q
// and the next of the eight from `base` on in `lower`, and of the eight behind them in `upper`. Lanes exchange a word with their
// neighbour and write 8 bytes each: 32 of every row.
QL_DEVICE void store_words(std::byte* y, int m_end, int n_end, int m, int base, uint32_t lower, uint32_t upper) {
    int q = thread() & 3;
    bool odd = (q & 1) != 0;
    int n = base + (odd ? 8 + 2 * (q - 1) : 2 * q);
    uint32_t got = shuffle_xor(odd ? lower : upper, 1);
    if (m < m_end && n < n_end) {
        store_global(y + 2 * (int64_t(m) * n_end + n), odd ? Words2{{got, upper}} : Words2{{lower, got}});
    }
}

}  // namespace quantlib::cuda

// Philox4x32-10 (Salmon et al., SC 2011): a draw is a pure function of (key, element index), so a mask does
// not depend on chunking, threads or device. Known answers of Random123 are in tests/test_philox.py.
#pragma once
#include "core/types.hpp"

namespace fastmerge {
namespace FM_ISA {

struct Philox4 {
    uint32_t w[4];
};

FM_HD inline Philox4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                   uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
        const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c1 = uint32_t(p1), c3 = uint32_t(p0), c0 = n0, c2 = n2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

/// 16-bit draws of elements [i, i + m): element e uses block e >> 3, half-word e & 7.
inline void draws16(uint64_t key, int64_t i, int m, uint32_t* out) {
    // Blocks first, over whole groups: the inner loop over blocks is what vectorises.
    uint32_t words[4][10];
    const int64_t first = i >> 3, n_blocks = ((i + m + 7) >> 3) - first;
    for (int64_t b = 0; b < n_blocks; ++b) {
        const uint64_t counter = uint64_t(first + b);
        const Philox4 r = philox4x32_10(uint32_t(counter), uint32_t(counter >> 32), 0, 0, uint32_t(key),
                                        uint32_t(key >> 32));
        for (int w = 0; w < 4; ++w) words[w][b] = r.w[w];
    }
    for (int j = 0; j < m; ++j) {
        const int64_t e = i + j - (first << 3);
        const uint32_t word = words[(e & 7) >> 1][e >> 3];
        out[j] = (e & 1) ? word >> 16 : word & 0xffffu;
    }
}

/// 32-bit draws of elements [i, i + m): element e uses block e >> 2, word e & 3.
inline void draws32(uint64_t key, int64_t i, int m, uint32_t* out) {
    for (int j = 0; j < m;) {
        const uint64_t counter = uint64_t(i + j) >> 2;
        const Philox4 r = philox4x32_10(uint32_t(counter), uint32_t(counter >> 32), 0, 0, uint32_t(key),
                                        uint32_t(key >> 32));
        for (int w = int((i + j) & 3); w < 4 && j < m; ++w, ++j) out[j] = r.w[w];
    }
}

}  // namespace FM_ISA
}  // namespace fastmerge

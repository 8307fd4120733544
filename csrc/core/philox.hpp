// Philox4x32-10 (Salmon et al., SC 2011): a draw is a pure function of (key, element index), so a mask does
// not depend on chunking, threads or device. Known answers of Random123 are in tests/agreement.py.
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

FM_HD inline Philox4 philox_block(uint64_t key, uint64_t counter) {
    return philox4x32_10(uint32_t(counter), uint32_t(counter >> 32), 0, 0, uint32_t(key),
                         uint32_t(key >> 32));
}

/// Word `w` of a block, without an index into registers.
FM_HD inline uint32_t word_of(const Philox4& r, int w) {
    return w < 2 ? (w ? r.w[1] : r.w[0]) : (w < 3 ? r.w[2] : r.w[3]);
}

FM_HD inline uint32_t half_of(const Philox4& r, int h) {
    const uint32_t word = word_of(r, h >> 1);
    return h & 1 ? word >> 16 : word & 0xffffu;
}

}  // namespace FM_ISA
}  // namespace fastmerge

// Philox blocks side by side in vector registers, for csrc/cpu.
#pragma once
#include "core/lanes.hpp"
#include "core/philox.hpp"

namespace fastmerge {
namespace FM_ISA {

/// The keys of the ten rounds, each in the low half of its word.
struct PhiloxKeys {
    uint64_t word[20];
    PhiloxKeys() {}  // left as it is: a walk of few elements has 64 of them
    explicit PhiloxKeys(uint64_t key) {
        uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
        for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
            word[2 * round] = k0, word[2 * round + 1] = k1;
    }
};

/// Words of N Philox blocks, those of counters `first` .. `first` + N - 1, side by side: low holds the first
/// two words of each block, high the others.
__attribute__((always_inline)) inline void philox_lanes(const PhiloxKeys& keys, uint64_t first, Longs& low,
                                                        Longs& high) {
    constexpr int N = WIDE / 8;
    // Only the low half of each lane counts; what is left in the high half never reaches a product.
    Longs c0;
    for (int j = 0; j < N; ++j) c0[j] = uint64_t(j);
    c0 += first;
    Longs c1 = c0 >> 32, c2 = {}, c3 = {};
    for (int round = 0; round < 10; ++round) {
        const Longs p0 = multiply_low(c0, Longs{} + 0xD2511F53u),
                    p1 = multiply_low(c2, Longs{} + 0xCD9E8D57u);
        c0 = (p1 >> 32) ^ c1 ^ keys.word[2 * round], c2 = (p0 >> 32) ^ c3 ^ keys.word[2 * round + 1];
        c1 = p1, c3 = p0;
    }
    low = (c0 & 0xffffffffu) | (c1 << 32), high = (c2 & 0xffffffffu) | (c3 << 32);
}

/// 16-bit draws of the 64 elements from `first`, a multiple of 64: eight Philox blocks side by side. Elements
/// are in little-endian order of the half-words of each block's four words.
inline void draws16_block(uint64_t key, int64_t first, uint16_t* out) {
    constexpr int N = WIDE / 8;
    const PhiloxKeys keys(key);
    for (int b = 0; b < 8; b += N) {
        Longs low, high;
        philox_lanes(keys, uint64_t(first >> 3) + uint64_t(b), low, high);
        const TwoLongs words = interleave(low, high);
        memcpy(out + 8 * b, &words, sizeof words);
    }
}

/// As draws16, of elements that are all in one group of 64.
inline void draws16_lanes(uint64_t key, int64_t i, int m, uint32_t* out) {
    uint16_t draw[64];
    const int64_t first = i & ~int64_t(63);
    draws16_block(key, first, draw);
    for (int j = 0; j < m; ++j) out[j] = draw[i - first + j];
}

}  // namespace FM_ISA
}  // namespace fastmerge

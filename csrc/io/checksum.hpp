// The checksum of tensor bytes that journal and manifest hold: a sum of mixed words, so that parts may be
// summed in any order, by any thread, and a tensor's checksum is that of its parts added up.
//
//   sum = sum_i mix(word_i ^ (i + 1) * G)  mod 2^64, i counted from the tensor's first byte
//
// mix is a bijection: a change of one word always shows. Not meant against forgery. One read per byte.
#pragma once
#include <cstdint>
#include <cstring>

namespace fastmerge {

constexpr uint64_t CHECKSUM_STEP = 0x9E3779B97F4A7C15u;

inline uint64_t checksum_mix(uint64_t x) {
    x ^= x >> 32;
    x *= 0xD6E8FEB86659FD93u;
    x ^= x >> 32;
    x *= 0xFF51AFD7ED558CCDu;
    return x ^ (x >> 29);
}

template <typename Word>
uint64_t checksum_words(const char* at, int64_t n_words, uint64_t first) {
    uint64_t sum = 0, key = (first + 1) * CHECKSUM_STEP;
    for (int64_t i = 0; i < n_words; ++i, key += CHECKSUM_STEP) {
        Word word;
        std::memcpy(&word, at + i * int64_t(sizeof(Word)), sizeof(Word));
        sum += checksum_mix(uint64_t(word) ^ key);
    }
    return sum;
}

/// Checksum of n_bytes that begin `start` bytes into their tensor; both are multiples of word (1, 2, 4, 8).
inline uint64_t checksum(const void* data, int64_t n_bytes, int word, int64_t start) {
    const char* at = static_cast<const char*>(data);
    const int64_t n = n_bytes / word;
    const uint64_t first = uint64_t(start / word);
    switch (word) {
        case 8:
            return checksum_words<uint64_t>(at, n, first);
        case 4:
            return checksum_words<uint32_t>(at, n, first);
        case 2:
            return checksum_words<uint16_t>(at, n, first);
        default:
            return checksum_words<uint8_t>(at, n, first);
    }
}

}  // namespace fastmerge

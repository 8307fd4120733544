#include "io/checksum.hpp"

#include <cstring>

#include "core/clones.hpp"

namespace fastmerge {
namespace {

constexpr uint64_t STEP = 0x9E3779B97F4A7C15u;

inline uint64_t mix(uint64_t x) {
    x ^= x >> 32;
    x *= 0xD6E8FEB86659FD93u;
    x ^= x >> 32;
    x *= 0xFF51AFD7ED558CCDu;
    return x ^ (x >> 29);
}

template <typename Word>
inline __attribute__((always_inline)) uint64_t sum_of(const char* at, int64_t n_words, uint64_t first) {
    uint64_t sum = 0, key = (first + 1) * STEP;
    for (int64_t i = 0; i < n_words; ++i, key += STEP) {
        Word word;
        std::memcpy(&word, at + i * int64_t(sizeof(Word)), sizeof(Word));
        sum += mix(uint64_t(word) ^ key);
    }
    return sum;
}

// One multiplication of 64 bits per lane: 11 GB/s as scalars, 17 with AVX2, 75 with AVX-512.
FM_CLONES uint64_t sum_of_8(const char* at, int64_t n, uint64_t first) {
    return sum_of<uint64_t>(at, n, first);
}
// Rows of odd length are rare and small; bytes of rows of one are what bitsandbytes stores.
FM_CLONES uint64_t sum_of_4(const char* at, int64_t n, uint64_t first) {
    return sum_of<uint32_t>(at, n, first);
}
FM_CLONES uint64_t sum_of_2(const char* at, int64_t n, uint64_t first) {
    return sum_of<uint16_t>(at, n, first);
}
FM_CLONES uint64_t sum_of_1(const char* at, int64_t n, uint64_t first) {
    return sum_of<uint8_t>(at, n, first);
}

}  // namespace

uint64_t checksum(const void* data, int64_t n_bytes, int word, int64_t start) {
    const char* at = static_cast<const char*>(data);
    const int64_t n = n_bytes / word;
    const uint64_t first = uint64_t(start / word);
    if (word == 8) return sum_of_8(at, n, first);
    if (word == 4) return sum_of_4(at, n, first);
    if (word == 2) return sum_of_2(at, n, first);
    return sum_of_1(at, n, first);
}

}  // namespace fastmerge

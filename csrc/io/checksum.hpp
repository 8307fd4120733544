// The checksum of tensor bytes that journal and manifest hold: a sum of mixed words, so that parts may be
// summed in any order, by any thread, and a tensor's checksum is that of its parts added up.
//
//   sum = sum_i mix(word_i ^ (i + 1) * G)  mod 2^64, i counted from the tensor's first byte
//
// mix is a bijection: a change of one word always shows. Not meant against forgery. One read per byte.
#pragma once
#include <cstdint>

namespace fastmerge {

/// Checksum of n_bytes that begin `start` bytes into their tensor; both are multiples of word (1, 2, 4, 8).
uint64_t checksum(const void* data, int64_t n_bytes, int word, int64_t start);

}  // namespace fastmerge

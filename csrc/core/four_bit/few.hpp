// Codes to float32, a few neighbours at a time: for a GPU's threads, which have few registers, and many of
// which read the same block. The values are decode.hpp's, which is for long runs.
#pragma once
#include "core/four_bit/bitsandbytes.hpp"
#include "core/four_bit/kquants.hpp"
#include "core/four_bit/words.hpp"

namespace fastmerge {
namespace FM_ISA {

constexpr int FEW = 8;

template <bool HIGH_FIRST>
FM_HD inline int nibble(const uint8_t* bytes, int64_t at) {
    return bytes[at >> 1] >> (((at & 1) != 0) != HIGH_FIRST ? 4 : 0) & 15;
}

/// Four bytes, low first, by as few accesses as their alignment allows.
FM_HD inline uint32_t four_bytes(const uint8_t* p) {
    if (reinterpret_cast<uintptr_t>(p) % 4 == 0) return *reinterpret_cast<const uint32_t*>(p);
    if (reinterpret_cast<uintptr_t>(p) % 2 == 0) {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(p);
        return halves[0] | uint32_t(halves[1]) << 16;
    }
    return p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24;
}

/// FEW bytes, loaded together.
struct Bytes {
    uint32_t word[2];

    FM_HD explicit Bytes(const uint8_t* p) : word{four_bytes(p), four_bytes(p + 4)} {}
    FM_EACH int operator[](int j) const { return int(word[j / 4] >> 8 * (j % 4) & 255u); }
};

/// FEW nibbles, loaded together.
template <bool HIGH_FIRST>
struct Nibbles {
    uint32_t word;

    FM_HD explicit Nibbles(const uint8_t* p) : word(four_bytes(p)) {}
    FM_EACH int operator[](int j) const { return int(word >> 4 * (HIGH_FIRST ? j ^ 1 : j) & 15u); }
};

/// out[j] = value(begin(group number), code of at + j) for m elements from `at` on, of groups of `group`.
/// one(j): the code of at + j; all(): of FEW elements from `at` on, if they may be `loaded` together.
template <class Begin, class One, class All, class Value>
FM_EACH void few_of_groups(int64_t group, int64_t at, int m, bool loaded, float* out, Begin begin, One one,
                           All all, Value value) {
    int64_t number = quotient(at, group), left = group - (at - number * group);
    auto of_group = begin(number);
    if (m == FEW && left >= FEW && loaded) {
        const auto codes = all();
        FM_UNROLL
        for (int j = 0; j < FEW; ++j) out[j] = value(of_group, codes[j]);
        return;
    }
    FM_ROLLED
    for (int j = 0; j < m; ++j, --left) {
        if (left == 0) of_group = begin(++number), left = group;
        out[j] = value(of_group, one(j));
    }
}

/// The same of nibbles, the first of which is number `first` of `bytes`.
template <bool HIGH_FIRST, class Begin, class Value>
FM_EACH void few_of_nibbles(int64_t group, int64_t at, int m, const uint8_t* bytes, int64_t first, float* out,
                            Begin begin, Value value) {
    few_of_groups(
        group, at, m, first % 2 == 0, out, begin, [&](int j) { return nibble<HIGH_FIRST>(bytes, first + j); },
        [&] { return Nibbles<HIGH_FIRST>(bytes + first / 2); }, value);
}

/// Magnitudes 0, 1/2, 1, 3/2, 2, 3, 4, 6: two bits of exponent and one of mantissa; bit 3 is the sign.
FM_HD inline float e2m1_value(int code) {
    const float magnitude = bit_cast<float>(uint32_t(code & 7) << 22) * 8.507059173023462e37f;  // 2^126
    return code & 8 ? -magnitude : magnitude;
}

template <class Book>
FM_HD inline void few_of_bnb(const Coded& c, int64_t flat, int m, float* out) {
    const int64_t first = quotient(c.origin, c.group);
    few_of_nibbles<true>(
        c.group, flat, m, c.codes, flat - c.origin, out,
        [&](int64_t block) { return bnb_absmax(c, block, first); },
        [&](float scale, int code) { return Book::value(code) * scale; });
}

FM_HD inline void few_of_int4(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const int64_t groups = groups_of_row(c);
    const ScaleType t = c.scale_type;
    const DType rounding = t == ScaleType::BF16 ? DType::BF16 : t == ScaleType::F16 ? DType::F16 : DType::F32;
    few_of_nibbles<false>(
        group_size(c), col, m, c.codes + row * ((c.cols + 7) / 8 * 4), col, out,
        [&](int64_t g) {
            Affine a = {load_scale(c.scales, t, row * groups + g), 8};
            if (!c.symmetric) a.zero = float(load_word(c.zeros, row / 8 * groups + g) >> 4 * (row % 8) & 15);
            return a;
        },
        [&](Affine a, int code) { return rounded_to(rounding, (float(code) - a.zero) * a.scale); });
}

template <class Group>
FM_HD inline void few_of_micro(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const uint8_t* scales = c.scales + row * groups_of_row(c);
    few_of_nibbles<false>(
        c.group, col, m, c.codes + row * (c.cols / 2), col, out,
        [&](int64_t g) { return Group::scale(c, scales[g]); },
        [&](float scale, int code) { return e2m1_value(code) * scale; });
}

FM_HD inline void few_of_words(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const bool awq = c.format == Format::Awq;
    const int64_t words = c.rows / 8, group = group_size(c);
    const int shift = 4 * (awq ? awq_nibble(row) : int(row % 8));
    FM_ROLLED
    for (int j = 0; j < m; ++j) {
        const int64_t k = col + j, g = c.group_of ? c.group_of[k] : quotient(k, group);
        const uint32_t stored = load_word(c.zeros, g * words + row / 8) >> shift;
        const float zero = float((stored + shift_of_zeros(c)) & 15);
        const float scale = half_to_float(load_half_word(c.scales + (g * c.rows + row) * 2));
        const uint32_t word = awq ? load_word(c.codes, k * words + row / 8) >> shift
                                  : load_word(c.codes, (k >> 3) * c.rows + row) >> 4 * (k & 7);
        out[j] = (float(word & 15) - zero) * scale;
    }
}

/// GGUF's blocks: value(begin(block, j), code), of the code at place(block, j); what `begin` gives is the
/// same for FEW neighbours.
struct Place {
    const uint8_t* byte;
    int shift;
};

/// Nibbles of which HALF low ones come first.
template <int ELEMENTS, int BYTES, int HALF>
struct FewNibbles {
    static constexpr int elements = ELEMENTS, bytes = BYTES, mask = 15;
    FM_EACH static Place halves(const uint8_t* codes, int j) { return {codes + j % HALF, j / HALF * 4}; }
};

struct FewQ4_0 : FewNibbles<32, 18, 16> {
    FM_EACH static Affine begin(const Coded&, const uint8_t* p, int) {
        return {half_to_float(load_half_word(p)), 0};
    }
    FM_EACH static Place place(const uint8_t* p, int j) { return halves(p + 2, j); }
    FM_EACH static float value(Affine a, int code) { return a.scale * float(code - 8); }
};
struct FewQ4_1 : FewNibbles<32, 20, 16> {
    FM_EACH static Affine begin(const Coded&, const uint8_t* p, int) {
        return {half_to_float(load_half_word(p)), half_to_float(load_half_word(p + 2))};
    }
    FM_EACH static Place place(const uint8_t* p, int j) { return halves(p + 4, j); }
    FM_EACH static float value(Affine a, int code) { return a.scale * float(code) + a.zero; }
};
struct FewQ8_0 {
    static constexpr int elements = 32, bytes = 34, mask = 255;
    FM_EACH static Affine begin(const Coded&, const uint8_t* p, int) {
        return {half_to_float(load_half_word(p)), 0};
    }
    FM_EACH static Place place(const uint8_t* p, int j) { return {p + 2 + j, 0}; }
    FM_EACH static float value(Affine a, int code) { return a.scale * float(int8_t(code)); }
};
struct FewMxfp4 : FewNibbles<32, 17, 16> {
    FM_EACH static Affine begin(const Coded&, const uint8_t* p, int) { return {e8m0_to_float(*p), 0}; }
    FM_EACH static Place place(const uint8_t* p, int j) { return halves(p + 1, j); }
    FM_EACH static float value(Affine a, int code) { return e2m1_value(code) * a.scale; }
};
struct FewNvfp4 : FewNibbles<64, 36, 8> {
    FM_EACH static Affine begin(const Coded& c, const uint8_t* p, int j) {
        const int stored = p[j / 16] & 0x7f;
        return {stored == 0x7f ? 0.f : e4m3_to_float(stored), c.tensor_scale};
    }
    FM_EACH static Place place(const uint8_t* p, int j) { return halves(p + 4 + j / 16 * 8, j % 16); }
    FM_EACH static float value(Affine a, int code) { return e2m1_value(code) * a.scale * a.zero; }
};
struct FewQ4_K : FewNibbles<256, 144, 32> {
    FM_EACH static Affine begin(const Coded&, const uint8_t* p, int j) {
        const float d = half_to_float(load_half_word(p)), dmin = half_to_float(load_half_word(p + 2));
        return {d * float(BlockQ4_K::scale_bits(p + 4, j / 32)),
                dmin * float(BlockQ4_K::minimum_bits(p + 4, j / 32))};
    }
    FM_EACH static Place place(const uint8_t* p, int j) { return halves(p + 16 + j / 64 * 32, j % 64); }
    FM_EACH static float value(Affine a, int code) { return a.scale * float(code) - a.zero; }
};

/// Columns [col, col + m) of a row of blocks.
template <class Block>
FM_HD inline void few_of_blocks(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    constexpr int E = Block::elements;
    const uint8_t* first = c.codes + row * (c.cols / E) * Block::bytes;
    if (m == FEW && col % FEW == 0) {
        const uint8_t* p = first + col / E * Block::bytes;
        const int place = int(col % E);
        const Affine a = Block::begin(c, p, place);
        const Place at = Block::place(p, place);
        const Bytes codes(at.byte);
        FM_UNROLL
        for (int j = 0; j < FEW; ++j) out[j] = Block::value(a, codes[j] >> at.shift & Block::mask);
        return;
    }
    FM_ROLLED
    for (int j = 0; j < m; ++j) {
        const uint8_t* p = first + (col + j) / E * Block::bytes;
        const int place = int((col + j) % E);
        const Place at = Block::place(p, place);
        out[j] = Block::value(Block::begin(c, p, place), *at.byte >> at.shift & Block::mask);
    }
}

FM_HD inline void few_of_q6_k(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const uint8_t* first = c.codes + row * (c.cols / 256) * 210;
    FM_ROLLED
    for (int j = 0; j < m; ++j) {
        const uint8_t* p = first + (col + j) / 256 * 210;
        const int place = int((col + j) % 256), run = place / 32, part = run % 4, i = place % 32;
        const int low = p[run / 4 * 64 + 32 * (part % 2) + i] >> part / 2 * 4 & 15;
        const int high = p[128 + run / 4 * 32 + i] >> 2 * part & 3;
        const float scale = half_to_float(load_half_word(p + 208)) * float(int8_t(p[192 + 2 * run + i / 16]));
        out[j] = scale * float((low | high << 4) - 32);
    }
}

template <class Begin, class Value>
FM_EACH void few_of_bytes(int64_t group, int64_t at, int m, const uint8_t* codes, float* out, Begin begin,
                          Value value) {
    few_of_groups(
        group, at, m, true, out, begin, [&](int j) { return int(codes[at + j]); },
        [&] { return Bytes(codes + at); }, value);
}

FM_HD inline void few_of_fp8(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const int64_t of_row = c.group_rows == 0 ? 0 : quotient(row, c.group_rows) * groups_of_row(c);
    few_of_bytes(
        group_size(c), col, m, c.codes + row * c.cols, out,
        [&](int64_t g) { return load_scale(c.scales, c.scale_type, c.group_rows == 0 ? 0 : of_row + g); },
        [&](float scale, int code) { return e4m3_to_float(uint32_t(code)) * scale; });
}

FM_HD inline void few_of_int8(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    few_of_bytes(
        c.cols, col, m, c.codes + row * c.cols, out,
        [&](int64_t) { return load_scale(c.scales, ScaleType::F32, row); },
        [&](float scale, int code) { return float(int8_t(code)) * scale / 127.f; });
}

/// Columns [col, col + m) of a stored row, counted from the row of `origin`.
FM_EACH void few_of_row(Format format, const Coded& c, int64_t row, int64_t col, int m, float* out) {
    switch (format) {
        case Format::Int4:
            return few_of_int4(c, row, col, m, out);
        case Format::Nvfp4:
            return few_of_micro<Nvfp4Group>(c, row, col, m, out);
        case Format::Mxfp4:
            return few_of_micro<Mxfp4Group>(c, row, col, m, out);
        case Format::Gptq:
        case Format::Awq:
            return few_of_words(c, row, col, m, out);
        case Format::Q4_0:
            return few_of_blocks<FewQ4_0>(c, row, col, m, out);
        case Format::Q4_1:
            return few_of_blocks<FewQ4_1>(c, row, col, m, out);
        case Format::Q8_0:
            return few_of_blocks<FewQ8_0>(c, row, col, m, out);
        case Format::Q4_K:
            return few_of_blocks<FewQ4_K>(c, row, col, m, out);
        case Format::Q6_K:
            return few_of_q6_k(c, row, col, m, out);
        case Format::GgufMxfp4:
            return few_of_blocks<FewMxfp4>(c, row, col, m, out);
        case Format::GgufNvfp4:
            return few_of_blocks<FewNvfp4>(c, row, col, m, out);
        case Format::Fp8:
            return few_of_fp8(c, row, col, m, out);
        case Format::Int8:
            return few_of_int8(c, row, col, m, out);
        default:
            return load_run(c.codes, c.type, row * c.cols + col, m, out);
    }
}

template <DType T>
FM_HD inline float element(const void* p, int64_t i) {
    float x = 0;
    load_run(p, T, i, 1, &x);
    return x;
}

/// Add low_scale * (B A) to columns [col, col + m) of a row.
template <DType T>
FM_HD inline void add_few_of_low_rank(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    float sum[FEW] = {};
    for (int r = 0; r < c.rank; ++r) {
        const float b = element<T>(c.low_b, row * c.rank + r);
        FM_UNROLL
        for (int j = 0; j < FEW; ++j)
            if (j < m) sum[j] += b * element<T>(c.low_a, r * c.cols + col + j);
    }
    FM_UNROLL
    for (int j = 0; j < FEW; ++j)
        if (j < m) out[j] += c.low_scale * sum[j];
}

FM_HD inline void add_few_of_low_rank(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    if (c.low_type == DType::BF16)
        add_few_of_low_rank<DType::BF16>(c, row, col, m, out);
    else if (c.low_type == DType::F16)
        add_few_of_low_rank<DType::F16>(c, row, col, m, out);
    else if (c.low_type == DType::F32)
        add_few_of_low_rank<DType::F32>(c, row, col, m, out);
    else
        add_few_of_low_rank<DType::F64>(c, row, col, m, out);
}

/// As decode_run, of m elements, m <= FEW. format: c's, a constant where that is known.
FM_EACH void decode_few(Format format, const Coded& c, int64_t i, int m, float* out) {
    const bool nf4 = format == Format::BnbNf4, flat = nf4 || format == Format::BnbFp4;
    if (nf4)
        few_of_bnb<Nf4>(c, c.first + i, m, out);
    else if (flat)
        few_of_bnb<Fp4>(c, c.first + i, m, out);
    if (flat && c.rank == 0) return;
    int64_t row = quotient(c.first + i, c.cols), col = c.first + i - row * c.cols;
    for (int done = 0; done < m; ++row, col = 0) {
        const int n = c.cols - col < m - done ? int(c.cols - col) : m - done;
        if (!flat) few_of_row(format, c, stored_row(c, row), col, n, out + done);
        if (c.rank > 0) add_few_of_low_rank(c, row, col, n, out + done);
        done += n;
    }
}

}  // namespace FM_ISA
}  // namespace fastmerge

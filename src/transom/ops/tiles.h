// Products with codes that lie in tiles of 16 outputs, by instructions for bytes.
//
// A vector has 4 inputs of each of the 16 outputs of a tile. A processor with VNNI multiplies these
// 64 bytes and adds them up by fours, in one instruction. The sums of an output stay in one lane:
// scales, offsets and the end of a product need no work across lanes.
//
// x becomes integers of 24 bits for each span of 32 inputs: q = round(x / unit) with |q| <=
// largest. Its three bytes (planes) are multiplied one after the other, and the sums are exact. So
// x loses no more than in float32 arithmetic. Numbers of x that fit bfloat16 take two planes and a
// unit that is a power of two: those above 1/128 of the largest of the 32 stay exact, others lose
// what is below 1/65536 of it. This is for weights with `rounded`, of which PyTorch's path rounds
// much more. Weights in groups of 16 inputs have spans of 16.
//
// Codes are unsigned bytes u, of which `center` stands for 0:
//     weight = scale * (u - center) + offset.
// The sum of every plane of a span starts at -center * (the sum of the plane), which is exact too.
//
// The layout, which quantize.formats.in_rows undoes:
// - 8 bits: vector b has inputs 4b to 4b + 3. Byte 4 * output + j is code + 128.
// - 4 bits: vector b has inputs 8b to 8b + 7. Byte 4 * output + j has input 8b + j in its low half
//   and input 8b + 4 + j in its high half.
// - scales, zeros, minimums and super scales: [tile, group, 16].
// Codes that stand for floats are multiplied in float_tiles.h.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"
#include "threads.h"
#include "weights.h"

constexpr int64_t kTile = 16;  // outputs

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__)
#define TRANSOM_TILES 1

#include <immintrin.h>

// The number of rows that are multiplied at once, with `left` rows left.
inline int64_t rows_at_once(int64_t left) {
    return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// The first of the rows that are multiplied at once with this one.
inline int64_t first_at_once(int64_t row, int64_t count) {
    int64_t first = row / 8 * 8;
    while (first + rows_at_once(count - first) <= row) first += rows_at_once(count - first);
    return first;
}

// Rows of x as planes of bytes. Of rows that are multiplied at once, spans come in turn, and in
// each span the rows. `facts` of a row in a span are what the sum of each plane starts at, an
// integer, then the unit and the sum of x.
template <bool four, int planes, int span>
struct PlaneRows {
    static constexpr int width = planes + 2;  // numbers of `facts`
    static constexpr float largest = planes == 3 ? 8355000.0f : 32639.0f;
    static constexpr int center = four ? 8 : 128;
    std::vector<int8_t> bytes;
    std::vector<float> facts;
    const float* x;
    int64_t count, inputs;

    void make(const float* from, int64_t rows, int64_t row_inputs, int threads) {
        x = from, count = rows, inputs = row_inputs;
        bytes.resize(rows * inputs * planes);
        facts.resize(rows * inputs / span * width);
        in_pool([this](int64_t row) { write_row(row); }, rows, rows < 4 ? 1 : threads);
    }

    // Where rows that are multiplied at once begin.
    const int8_t* bytes_of(int64_t row) const { return bytes.data() + row * inputs * planes; }
    const float* facts_of(int64_t row) const { return facts.data() + row * inputs / span * width; }

    void write_row(int64_t row) {
        const int64_t first = first_at_once(row, count);
        const int64_t together = rows_at_once(count - first), spans = inputs / span;
        for (int64_t s = 0; s < spans; ++s) {
            const int64_t place = first * spans + s * together + row - first;
            write_span(x + row * inputs + s * span, bytes.data() + place * planes * span,
                       facts.data() + place * width);
        }
    }

    static void write_span(const float* from, int8_t* to, float* fact) {
        constexpr int parts = span / 16;
        __m512 x[parts];
        // The bits of positive floats are ordered as they are, and NaN is above all.
        __m512i largest_bits = _mm512_setzero_si512();
        for (int part = 0; part < parts; ++part) {
            x[part] = _mm512_loadu_ps(from + 16 * part);
            const __m512i bits = _mm512_castps_si512(_mm512_abs_ps(x[part]));
            largest_bits = _mm512_max_epi32(largest_bits, bits);
        }
        const int bits = _mm512_reduce_max_epi32(largest_bits);
        float most;
        std::memcpy(&most, &bits, sizeof most);
        float unit = most / largest, inverse = most > 0 ? largest / most : most;
        if (planes == 2) {
            unit = power_of_two(unit);
            inverse = unit > 0 ? 1.0f / unit : 0.0f;
        }
        __m512i all = _mm512_setzero_si512(), totals[planes];
        for (auto& total : totals) total = all;
        for (int part = 0; part < parts; ++part) {
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x[part], _mm512_set1_ps(inverse)));
            all = _mm512_add_epi32(all, q);
#pragma GCC unroll 3
            for (int plane = planes - 1; plane >= 0; --plane) {
                const __m512i byte = _mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24);
                q = _mm512_srai_epi32(_mm512_sub_epi32(q, byte), 8);
                totals[plane] = _mm512_add_epi32(totals[plane], byte);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + plane * span + 16 * part),
                                 _mm512_cvtepi32_epi8(byte));
            }
        }
        for (int plane = 0; plane < planes; ++plane) {
            const int start = -center * _mm512_reduce_add_epi32(totals[plane]);
            std::memcpy(fact + plane, &start, sizeof start);
        }
        fact[planes] = unit;
        fact[planes + 1] = unit * float(_mm512_reduce_add_epi32(all));
    }

    // The least power of two that is not smaller. Infinity and NaN stay, tiny numbers become 0.
    static float power_of_two(float value) {
        if (value <= 1e-30f) return 0;
        if (value - value != 0) return value;
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits = (bits + 0x7fffff) & 0x7f800000;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
};

// 16 numbers of a kind.
inline __m512 sixteen(const void* from, int64_t kind, int64_t first) {
    if (kind == kFloat32) return _mm512_loadu_ps(static_cast<const float*>(from) + first);
    if (kind == kInt8) {
        const auto* at = reinterpret_cast<const __m128i*>(static_cast<const int8_t*>(from) + first);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at)));
    }
    const auto* at = reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + first);
    const __m256i words = _mm256_loadu_si256(at);
    if (kind == kFloat16) return _mm512_cvtph_ps(words);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// Write the scales and offsets [group, 16] of a tile.
inline void write_factors(const Weight& weight, int64_t tile, float* scales, float* offsets) {
    const int64_t groups = weight.inputs / weight.group;
    // What the code in the center stands for, in units of the scale.
    const __m512 middle = _mm512_set1_ps(weight.levels ? weight.levels[0] + 8 : 0.0f);
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t group = tile * groups + g, at = group * kTile;
        __m512 scale = sixteen(weight.scales, weight.scale_kind, at);
        __m512 offset = _mm512_setzero_ps(), value = middle;
        if (weight.zeros) value = _mm512_sub_ps(middle, sixteen(weight.zeros, kInt8, at));
        if (weight.minimums) offset = sixteen(weight.minimums, weight.scale_kind, at);
        if (weight.block) {
            const int64_t super = group / weight.block * kTile, kind = weight.super_kind;
            scale = _mm512_mul_ps(scale, sixteen(weight.super_scales, kind, super));
            if (weight.minimums)
                offset = _mm512_mul_ps(offset, sixteen(weight.super_minimums, kind, super));
        }
        _mm512_storeu_ps(scales + g * kTile, scale);
        _mm512_storeu_ps(offsets + g * kTile, _mm512_fmadd_ps(scale, value, offset));
    }
}

// Products of codes that are integers in a row, as bytes.
template <bool four, int planes, int span>
struct ByteTiles {
    using Rows = PlaneRows<four, planes, span>;
    // Of `made` in the rows of a call.
    static constexpr int bit = 256 << (4 * four + 2 * (planes - 2) + (span == 32));

    // Write the products of R rows with the 16 outputs of a tile, one vector per row.
    template <int R>
    static void products(const uint8_t* codes, const float* scales, const float* offsets,
                         const Weight& weight, const Rows& rows, int64_t row, __m512* to) {
        constexpr int vectors = span / 4, read = four ? vectors / 2 : vectors;
        constexpr int width = Rows::width;
        const int8_t* x = rows.bytes_of(row);
        const float* facts = rows.facts_of(row);
        const bool added = weight.minimums || weight.zeros || (four && weight.levels[0] != -8);
        const __m512i low = _mm512_set1_epi8(15);
        __m512 sums[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_ps();
        for (int64_t begin = 0; begin < weight.inputs; begin += weight.group) {
            const __m512 scale = _mm512_loadu_ps(scales), offset = _mm512_loadu_ps(offsets);
            scales += kTile, offsets += kTile;
            for (int64_t i = 0; i < weight.group; i += span) {
                __m512i u[vectors];
#pragma GCC unroll 8
                for (int v = 0; v < read; ++v, codes += 64) {
                    const __m512i bytes = _mm512_loadu_si512(codes);
                    __builtin_prefetch(codes + 4096, 0, 2);
                    u[four ? 2 * v : v] = four ? _mm512_and_si512(bytes, low) : bytes;
                    if (four) u[2 * v + 1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r, x += planes * span, facts += width) {
                    __m512i total[planes];
#pragma GCC unroll 3
                    for (int p = 0; p < planes; ++p) {
                        total[p] = _mm512_castps_si512(_mm512_set1_ps(facts[p]));
                    }
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; ++v)
#pragma GCC unroll 3
                        for (int p = 0; p < planes; ++p) {
                            int inputs;
                            std::memcpy(&inputs, x + p * span + 4 * v, sizeof inputs);
                            const __m512i four_of_x = _mm512_set1_epi32(inputs);
                            total[p] = _mm512_dpbusd_epi32(total[p], u[v], four_of_x);
                        }
                    const __m512i high = _mm512_slli_epi32(total[0], 8);
                    __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(high, total[1]));
                    if (planes == 3) {  // 32 bits don't hold all three
                        value = _mm512_fmadd_ps(value, _mm512_set1_ps(256.0f),
                                                _mm512_cvtepi32_ps(total[planes - 1]));
                    }
                    const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(facts[planes]));
                    const __m512 sum_of_x = _mm512_set1_ps(facts[planes + 1]);
                    sums[r] = _mm512_fmadd_ps(value, factor, sums[r]);
                    if (added) sums[r] = _mm512_fmadd_ps(offset, sum_of_x, sums[r]);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) to[r] = sums[r];
    }
};

// Write the numbers of one row of a weight in tiles, rounded after every operation as PyTorch does:
// (code - zero) * scale + minimum.
template <bool four>
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("fp-contract=off")))
#endif
inline void write_row(const Weight& weight, int64_t row, float* to) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
    const int64_t tile = row / kTile, lane = row % kTile, bytes = row_bytes(weight);
    const int64_t groups = weight.inputs / weight.group;
    const auto* from = static_cast<const uint8_t*>(weight.codes) + tile * kTile * bytes + 4 * lane;
    const __m512i places = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        _mm512_set1_epi32(4 * kTile));
    const float lowest = four ? weight.levels[0] : -128.0f;
    const bool table = four && !in_a_row(weight.levels);
    const __m512 levels = four ? _mm512_loadu_ps(weight.levels) : _mm512_setzero_ps();
    for (int64_t i = 0; i < bytes; i += 64) {
        const int64_t words = std::min<int64_t>(16, (bytes - i) / 4);
        const __m512i read = _mm512_mask_i32gather_epi32(
            _mm512_setzero_si512(), __mmask16((1 << words) - 1), places, from + i * kTile, 1);
        // 16 inputs of the row at a time.
        __m512i parts[2] = {read, read};
        if (four) {
            const __m512i low = _mm512_set1_epi8(15);
            const __m512i first = _mm512_and_si512(read, low);
            const __m512i second = _mm512_and_si512(_mm512_srli_epi16(read, 4), low);
            parts[0] = _mm512_unpacklo_epi32(first, second);
            parts[1] = _mm512_unpackhi_epi32(first, second);
        }
        alignas(64) uint8_t codes[2][64];
        for (int part = 0; part < 2; ++part) _mm512_store_si512(codes[part], parts[part]);
        const int64_t first = four ? 2 * i : i, count = four ? 8 * words : 4 * words;
        for (int64_t j = 0; j < count; j += 16) {
            const int64_t group = tile * groups + (first + j) / weight.group;
            const int64_t at = group * kTile + lane;
            const uint8_t* own = four ? codes[j / 16 % 2] + j / 32 * 16 : codes[0] + j;
            float scale = number_at(weight.scales, weight.scale_kind, at);
            float shift = lowest, added = 0;
            if (weight.zeros) shift -= float(weight.zeros[at]);
            if (weight.minimums) added = number_at(weight.minimums, weight.scale_kind, at);
            if (weight.block) {
                const int64_t super = group / weight.block * kTile + lane;
                scale *= number_at(weight.super_scales, weight.super_kind, super);
                if (weight.minimums)
                    added *= number_at(weight.super_minimums, weight.super_kind, super);
            }
            const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(own));
            const __m512i wide = _mm512_cvtepu8_epi32(sixteen);
            __m512 values = table ? _mm512_permutexvar_ps(wide, levels)
                                  : _mm512_add_ps(_mm512_cvtepi32_ps(wide), _mm512_set1_ps(shift));
            values = _mm512_mul_ps(values, _mm512_set1_ps(scale));
            if (weight.minimums) values = _mm512_add_ps(values, _mm512_set1_ps(added));
            _mm512_storeu_ps(to + first + j, values);
        }
    }
}

#endif

// The halves of the two lowest bytes as four bytes, the high half of a byte before the low one.
inline uint32_t spread(uint32_t bytes) {
    const uint32_t apart = (bytes & 0xff) | (bytes & 0xff00) << 8;
    return (apart >> 4 & 0x000f000f) | (apart & 0x000f000f) << 8;
}

// Bring 16 rows of codes into a tile, in place.
inline void to_tile(uint8_t* codes, int64_t row_bytes, bool four) {
    static thread_local std::vector<uint8_t> own;
    own.assign(codes, codes + kTile * row_bytes);
    for (int64_t i = 0; i < row_bytes; i += 4)
        for (int64_t o = 0; o < kTile; ++o) {
            uint32_t word;  // its lowest byte is the first one of the row
            std::memcpy(&word, own.data() + o * row_bytes + i, sizeof word);
            // In rows, the first of two codes is in the high half of a byte.
            word = four ? spread(word) | spread(word >> 16) << 4 : word ^ 0x80808080;
            std::memcpy(codes + i * kTile + 4 * o, &word, sizeof word);
        }
}

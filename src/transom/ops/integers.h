// Products of one or two rows with codes that are integers, by instructions for bytes.
//
// A processor with VNNI multiplies 64 bytes and adds them up by fours, in one instruction. x
// becomes integers of 24 bits for each 32 inputs: q = round(x / unit) with |q| <= largest. Its
// three bytes are multiplied one after the other, and the sums are exact. So x loses no more than
// in float32 arithmetic, and one row needs half the instructions of kernel.h.
//
// Numbers of x that fit bfloat16 take two bytes and a unit that is a power of two: those above
// 1/128 of the largest of the 32 stay exact, others lose what is below 1/65536 of it. This is for
// weights with `rounded`, of which PyTorch's path rounds much more.
//
// The weight is scale * u + offset, with u = the code as an unsigned number. So
//     sum of weight * x = sum over groups of scale * unit * (sum of u * q) + offset * (sum of x).

#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__)
#define TRANSOM_INTEGERS 1

// The rows of x as bytes.
struct ByteRows {
    static constexpr int64_t span = 32;  // inputs that share a unit
    static constexpr float largest = 8355000.0f;  // three signed bytes hold a little more
    static constexpr float largest_of_two = 32639.0f;
    const int8_t* bytes[2];  // of each row: for every 64 inputs, 64 bytes of each of the planes
    const float *units[2], *sums[2];  // [inputs / span]

    static __m512 largest_of(__m512 first, __m512 second) {
        // The bits of positive floats are ordered as they are, and NaN is above all.
        const __m512i sign = _mm512_set1_epi32(0x7fffffff);
        const __m512i a = _mm512_and_si512(_mm512_castps_si512(first), sign);
        const __m512i b = _mm512_and_si512(_mm512_castps_si512(second), sign);
        const int most = _mm512_reduce_max_epi32(_mm512_max_epi32(a, b));
        return _mm512_castsi512_ps(_mm512_set1_epi32(most));
    }

    // Write the planes of 64 inputs. With 4-bit codes, the even ones come first.
    template <bool four, int planes>
    static void write(const float* x, int8_t* to, float* units, float* sums) {
        for (int half = 0; half < 2; ++half, x += span) {
            const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + 16);
            const float most = _mm512_cvtss_f32(largest_of(first, second));
            float unit = most / largest, inverse = most > 0 ? largest / most : most;
            if (planes == 2) {
                unit = power_of_two(most / largest_of_two);
                inverse = unit > 0 ? 1.0f / unit : 0.0f;
            }
            const __m512 factor = _mm512_set1_ps(inverse);
            int total = 0;
            for (int part = 0; part < 2; ++part) {
                const __m512i q =
                    _mm512_cvtps_epi32(_mm512_mul_ps(part ? second : first, factor));
                const __m512i low = signed_byte(q);
                const __m512i rest = _mm512_srai_epi32(_mm512_sub_epi32(q, low), 8);
                const __m512i middle = signed_byte(rest);
                const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(rest, middle), 8);
                const __m512i of[3] = {low, middle, high};
                total += _mm512_reduce_add_epi32(q);
                int8_t* at = to + (four ? half * 16 + part * 8 : half * 32 + part * 16);
                for (int plane = planes - 1; plane >= 0; --plane) {
                    const __m128i sixteen = _mm512_cvtepi32_epi8(of[plane]);
                    if (four) {
                        const __m128i split = _mm_shuffle_epi8(
                            sixteen, _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4,
                                                  2, 0));
                        _mm_storel_epi64(reinterpret_cast<__m128i*>(at), split);
                        _mm_storel_epi64(reinterpret_cast<__m128i*>(at + 32),
                                         _mm_unpackhi_epi64(split, split));
                    } else {
                        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), sixteen);
                    }
                    at += 64;
                }
            }
            units[half] = unit;
            sums[half] = unit * float(total);
        }
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
    static __m512i signed_byte(__m512i q) {
        return _mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24);
    }
};

// Add the sums over groups for O outputs and R rows to totals[r * O + o], of 16 partial sums.
// scales[(r * O + o) * spans + s] multiply the sums of span s.
template <bool four, int planes, int R, int O>
inline void byte_tile(const ByteRows& x, const uint8_t* const* codes, const float* scales,
                      int64_t inputs, int64_t ahead, __m512* totals) {
    const int64_t spans = inputs / ByteRows::span;
    const __m512i shifts = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_setzero_si256(), 1);
    const __m512i lowest = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(-128);
    // Which of the scales of two spans belongs to a lane.
    const __m512i places = four ? _mm512_set_epi64(1L << 32 | 1, 1L << 32 | 1, 0, 0,
                                                   1L << 32 | 1, 1L << 32 | 1, 0, 0)
                                : _mm512_set_epi64(1L << 32 | 1, 1L << 32 | 1, 1L << 32 | 1,
                                                   1L << 32 | 1, 0, 0, 0, 0);
    __m512 total[R * O];
#pragma GCC unroll 16
    for (int i = 0; i < R * O; ++i) total[i] = totals[i];
    for (int64_t b = 0; b < inputs / 64; ++b) {
        __m512i u[O];
#pragma GCC unroll 16
        for (int o = 0; o < O; ++o) {
            const uint8_t* from = codes[o] + b * (four ? 32 : 64);
            __builtin_prefetch(from + ahead, 0, 2);
            if (four) {
                const auto* at = reinterpret_cast<const __m256i*>(from);
                const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(at));
                u[o] = _mm512_and_si512(_mm512_srlv_epi16(twice, shifts), lowest);
            } else {
                u[o] = _mm512_xor_si512(_mm512_loadu_si512(from), sign);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const int8_t* from = x.bytes[r] + b * planes * 64;
            const __m512i high = _mm512_loadu_si512(from);
            const __m512i middle = _mm512_loadu_si512(from + 64);
            const __m512i low = planes == 3 ? _mm512_loadu_si512(from + 128) : high;
#pragma GCC unroll 16
            for (int o = 0; o < O; ++o) {
                __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), u[o], high);
                sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), u[o], middle);
                __m512 value;
                if (planes == 2) {
                    value = _mm512_cvtepi32_ps(sum);
                } else if (four) {
                    sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), u[o], low);
                    value = _mm512_cvtepi32_ps(sum);
                } else {  // 32 bits don't hold the sum of three planes
                    const __m512i rest = _mm512_dpbusd_epi32(_mm512_setzero_si512(), u[o], low);
                    value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(256.0f),
                                            _mm512_cvtepi32_ps(rest));
                }
                double pair;
                std::memcpy(&pair, scales + (r * O + o) * spans + 2 * b, sizeof pair);
                const __m512 scale = _mm512_permutevar_ps(
                    _mm512_castpd_ps(_mm512_set1_pd(pair)), places);
                total[r * O + o] = _mm512_fmadd_ps(value, scale, total[r * O + o]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * O; ++i) totals[i] = total[i];
}

// 16 scales or minimums of groups from `first` on, of which the mask counts.
inline __m512 masked_numbers(const void* from, int64_t kind, int64_t first, __mmask16 mask) {
    if (kind == kFloat32) {
        return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(from) + first);
    }
    const auto* words = static_cast<const uint16_t*>(from) + first;
    const __m256i sixteen = _mm256_maskz_loadu_epi16(mask, words);
    if (kind == kFloat16) return _mm512_cvtph_ps(sixteen);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen), 16));
}

// The scales and offsets of the spans of one output. `shift` is the binary logarithm of the spans
// of a group. What isn't simply stored is widened first.
struct SpanFactors {
    const Weight& weight;
    const bool simple;
    const int64_t groups;
    int shift = 0;
    float *scales, *offsets;  // of each output in turn [groups], for what isn't simple

    SpanFactors(const Weight& of, float* scratch)
        : weight(of),
          simple(!of.block && !of.zeros && of.group == ByteRows::span &&
                 of.scale_kind <= kBFloat16),
          groups(of.inputs / of.group),
          scales(scratch),
          offsets(scratch + groups) {
        while (shift < 31 && ByteRows::span << shift < of.group) ++shift;
    }

    // Write scale * unit of every span to to[(r * O + o) * spans], and add to totals[r * O + o]
    // what the offsets contribute to the products.
    template <int R, int O>
    void write(const ByteRows& x, const int64_t* outputs, float* to, __m512* totals) const {
        const int64_t spans = weight.inputs / ByteRows::span;
        const __m512 first = _mm512_set1_ps(weight.levels ? weight.levels[0] : -128.0f);
        const __m512i lanes =
            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        if (!simple) {
            for (int o = 0; o < O; ++o) {
                const int64_t at = 2 * o * groups;
                widen_factors(weight, outputs[o], scales + at, offsets + at);
            }
        }
        for (int64_t s = 0; s < spans; s += 16) {
            const __mmask16 mask = spans - s >= 16 ? 0xffff : (1 << (spans - s)) - 1;
            __m512 units[R], sums[R];
            for (int r = 0; r < R; ++r) {
                units[r] = _mm512_maskz_loadu_ps(mask, x.units[r] + s);
                sums[r] = _mm512_maskz_loadu_ps(mask, x.sums[r] + s);
            }
            const __m512i group = _mm512_srl_epi32(
                _mm512_add_epi32(lanes, _mm512_set1_epi32(int(s))), _mm_cvtsi32_si128(shift));
#pragma GCC unroll 16
            for (int o = 0; o < O; ++o) {
                __m512 scale, offset = _mm512_setzero_ps();
                if (simple) {
                    const int64_t at = outputs[o] * groups + s;
                    scale = masked_numbers(weight.scales, weight.scale_kind, at, mask);
                    if (weight.minimums)
                        offset = masked_numbers(weight.minimums, weight.scale_kind, at, mask);
                } else {
                    const float* from = scales + 2 * o * groups;
                    scale = _mm512_mask_i32gather_ps(offset, mask, group, from, 4);
                    offset = _mm512_mask_i32gather_ps(offset, mask, group, from + groups, 4);
                }
                offset = _mm512_fmadd_ps(scale, first, offset);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    const int place = r * O + o;
                    _mm512_mask_storeu_ps(to + place * spans + s, mask,
                                          _mm512_mul_ps(scale, units[r]));
                    totals[place] = _mm512_fmadd_ps(offset, sums[r], totals[place]);
                }
            }
        }
    }
};

// The sums of four vectors.
inline __m128 sums_of_four(const __m512* v) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 all =
        _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#endif

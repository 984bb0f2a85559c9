// Vectors of float32 with the few operations that the products need.
//
// `Wide` is the vector of 16 numbers of AVX-512, `Narrow` one of 8 numbers: AVX2 where the compiler
// targets it, else a vector type of GCC and Clang, which they compile to NEON or SSE.
// Without AVX-512 `Wide` is `Narrow`. `Brain` has 32 numbers in bfloat16, whose products are summed
// in float32 by pairs. It exists where the processor has such an instruction.
//
// In each, `Vector` has numbers of x or of a weight, and `Sums` has running sums in float32.
// `Levels` are the values of the 16 codes of 4 bits in one group of a weight.

#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "weights.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

// float32 of a number in float16.
inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    uint32_t bits;
    if (rest >= 0x7c00) {  // infinite or NaN
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + (112u << 23));
    } else {  // subnormal: a multiple of 2^-24
        const float value = float(rest) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &value, sizeof bits);
        bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

// float32 of a number in bfloat16.
inline float brain_to_float(uint16_t brain) {
    const uint32_t bits = uint32_t(brain) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// float32 of the floats of 8 bits, e4m3fn: no infinity, a bias of 7.
inline const std::array<float, 256> float8_values = [] {
    std::array<float, 256> values{};
    for (int code = 0; code < 128; ++code) {
        const int exponent = code >> 3, fraction = code & 7;
        values[code] = exponent ? float(8 + fraction) * float(1 << exponent) / 1024.0f
                                : float(fraction) / 512.0f;
        if (code == 127) values[code] = __builtin_nanf("");
        values[code + 128] = -values[code];
    }
    return values;
}();

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Narrow {
    static constexpr int lanes = 8;
    using Vector = __m256;
    using Sums = __m256;
    using Number = float;
    static constexpr Kind kind = kFloat32;

    static Sums zero() { return _mm256_setzero_ps(); }
    static Vector load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Vector values) { _mm256_storeu_ps(to, values); }
    static Sums add(Vector a, Vector b, Sums c) { return _mm256_fmadd_ps(a, b, c); }
    static float sum(Sums values) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
    }
    static Sums sums(const Sums* of) {  // of 8 vectors
        Sums all = zero();
        for (int lane = 0; lane < lanes; ++lane) all[lane] = sum(of[lane]);
        return all;
    }

    static Vector halves(const uint16_t* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static Vector brains(const uint16_t* from) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
    }
    static Vector bytes(const int8_t* from, float scale, float offset) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
        return _mm256_fmadd_ps(values, _mm256_set1_ps(scale), _mm256_set1_ps(offset));
    }
    // Floats of 8 bits, none of them NaN. Their bits are those of a half, but for its bias.
    static Vector floats(const int8_t* from, float scale, float offset) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        const __m128i words = _mm_slli_epi16(_mm_cvtepi8_epi16(eight), 7);
        const __m256 values = _mm256_cvtph_ps(_mm_and_si128(words, _mm_set1_epi16(-0x4080)));
        return _mm256_fmadd_ps(values, _mm256_set1_ps(scale * 256), _mm256_set1_ps(offset));
    }

    // The numbers at even and at odd places of 16.
    static void split(const float* from, Vector& even, Vector& odd) {
        const __m256 first = _mm256_loadu_ps(from), second = _mm256_loadu_ps(from + 8);
        const auto in_order = [](__m256 values) {
            return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(values), 0xd8));
        };
        even = in_order(_mm256_shuffle_ps(first, second, 0x88));
        odd = in_order(_mm256_shuffle_ps(first, second, 0xdd));
    }

    struct Levels {
        __m256 low, high;
        Levels() = default;
        Levels(const float* levels, float scale, float offset) {
            const __m256 factor = _mm256_set1_ps(scale), added = _mm256_set1_ps(offset);
            low = _mm256_fmadd_ps(_mm256_loadu_ps(levels), factor, added);
            high = _mm256_fmadd_ps(_mm256_loadu_ps(levels + 8), factor, added);
        }
        // Only the lowest 4 bits of an index count.
        __m256 at(__m256i index) const {
            const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                    _mm256_permutevar8x32_ps(high, index), bit3);
        }
        // The codes in the high and in the low halves of 8 bytes.
        void pairs(const uint8_t* bytes, Vector* to) const {
            const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
            const __m256i wide = _mm256_cvtepu8_epi32(eight);
            to[0] = at(_mm256_srli_epi32(wide, 4));
            to[1] = at(wide);
        }
    };

    // Levels that are integers in a row: arithmetic is faster than a table here.
    struct Integers {
        __m256 scale, offset;
        Integers() = default;
        Integers(const float* levels, float factor, float added)
            : scale(_mm256_set1_ps(factor)), offset(_mm256_set1_ps(levels[0] * factor + added)) {}
        void pairs(const uint8_t* bytes, Vector* to) const {
            const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
            const __m256i wide = _mm256_cvtepu8_epi32(eight);
            const __m256i low = _mm256_and_si256(wide, _mm256_set1_epi32(15));
            const __m256i high = _mm256_srli_epi32(wide, 4);
            to[0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), scale, offset);
            to[1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), scale, offset);
        }
    };
};

#else

struct Narrow {
    static constexpr int lanes = 8;
    typedef float Vector __attribute__((vector_size(32)));
    using Sums = Vector;
    using Number = float;
    static constexpr Kind kind = kFloat32;
    typedef int8_t Bytes __attribute__((vector_size(8)));
    typedef uint8_t Unsigned __attribute__((vector_size(8)));
    typedef uint16_t Words __attribute__((vector_size(16)));
    typedef uint32_t Bits __attribute__((vector_size(32)));

    static Sums zero() { return Sums{}; }
    static Vector load(const float* from) {
        Vector values;
        std::memcpy(&values, from, sizeof values);
        return values;
    }
    static void store(float* to, Vector values) { std::memcpy(to, &values, sizeof values); }
    static Sums add(Vector a, Vector b, Sums c) { return a * b + c; }
    static float sum(Sums values) {
        float total = 0;
        for (int lane = 0; lane < lanes; ++lane) total += values[lane];
        return total;
    }
    static Sums sums(const Sums* of) {  // of 8 vectors
        Sums all = zero();
        for (int lane = 0; lane < lanes; ++lane) all[lane] = sum(of[lane]);
        return all;
    }

    static Vector halves(const uint16_t* from) {
        Vector values;
        for (int lane = 0; lane < lanes; ++lane) values[lane] = half_to_float(from[lane]);
        return values;
    }
    static Vector brains(const uint16_t* from) {
        Words words;
        std::memcpy(&words, from, sizeof words);
        return Vector(__builtin_convertvector(words, Bits) << 16);
    }
    static Vector bytes(const int8_t* from, float scale, float offset) {
        Bytes codes;
        std::memcpy(&codes, from, sizeof codes);
        return __builtin_convertvector(codes, Vector) * scale + offset;
    }
    static Vector floats(const int8_t* from, float scale, float offset) {
        Vector values;
        for (int lane = 0; lane < lanes; ++lane) values[lane] = float8_values[uint8_t(from[lane])];
        return values * scale + offset;
    }

    static void split(const float* from, Vector& even, Vector& odd) {
        for (int lane = 0; lane < lanes; ++lane) {
            even[lane] = from[2 * lane];
            odd[lane] = from[2 * lane + 1];
        }
    }

    struct Levels {
        float values[16];
        Levels() = default;
        Levels(const float* levels, float scale, float offset) {
            for (int code = 0; code < 16; ++code) values[code] = levels[code] * scale + offset;
        }
        void pairs(const uint8_t* bytes, Vector* to) const {
            for (int lane = 0; lane < lanes; ++lane) {
                to[0][lane] = values[bytes[lane] >> 4];
                to[1][lane] = values[bytes[lane] & 15];
            }
        }
    };

    struct Integers {
        float scale, offset;
        Integers() = default;
        Integers(const float* levels, float factor, float added)
            : scale(factor), offset(levels[0] * factor + added) {}
        void pairs(const uint8_t* from, Vector* to) const {
            Unsigned codes;
            std::memcpy(&codes, from, sizeof codes);
            to[0] = __builtin_convertvector(codes >> 4, Vector) * scale + offset;
            to[1] = __builtin_convertvector(codes & 15, Vector) * scale + offset;
        }
    };
};

#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)

struct Wide {
    static constexpr int lanes = 16;
    using Vector = __m512;
    using Sums = __m512;
    using Number = float;
    static constexpr Kind kind = kFloat32;

    static Sums zero() { return _mm512_setzero_ps(); }
    static Vector load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Vector values) { _mm512_storeu_ps(to, values); }
    static Sums add(Vector a, Vector b, Sums c) { return _mm512_fmadd_ps(a, b, c); }
    static float sum(Sums values) { return _mm512_reduce_add_ps(values); }

    // The sums of 16 vectors, each in the lane of its number.
    static Sums sums(const Sums* of) {
        __m512 fours[4];  // of 4 vectors in turn: their sums over the same 4 lanes, 4 times
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i, of += 4) {
            const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(of[0], of[1]),
                                           _mm512_unpackhi_ps(of[0], of[1]));
            const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(of[2], of[3]),
                                           _mm512_unpackhi_ps(of[2], of[3]));
            fours[i] =
                _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
        }
        const auto halves = [](__m512 a, __m512 b) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44),
                                 _mm512_shuffle_f32x4(a, b, 0xee));
        };
        const __m512 first = halves(fours[0], fours[1]), second = halves(fours[2], fours[3]);
        return _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88),
                             _mm512_shuffle_f32x4(first, second, 0xdd));
    }

    static Vector halves(const uint16_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static Vector brains(const uint16_t* from) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
    static Vector bytes(const int8_t* from, float scale, float offset) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
        return _mm512_fmadd_ps(values, _mm512_set1_ps(scale), _mm512_set1_ps(offset));
    }
    static Vector floats(const int8_t* from, float scale, float offset) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(sixteen), 7);
        const __m512 values = _mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16(-0x4080)));
        return _mm512_fmadd_ps(values, _mm512_set1_ps(scale * 256), _mm512_set1_ps(offset));
    }

    static void split(const float* from, Vector& even, Vector& odd) {
        const __m512 first = _mm512_loadu_ps(from), second = _mm512_loadu_ps(from + 16);
        const __m512i places = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6,
                                                4, 2, 0);
        even = _mm512_permutex2var_ps(first, places, second);
        odd = _mm512_permutex2var_ps(first, _mm512_add_epi32(places, _mm512_set1_epi32(1)), second);
    }

    struct Levels {
        __m512 values;
        Levels() = default;
        Levels(const float* levels, float scale, float offset)
            : values(_mm512_fmadd_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale),
                                     _mm512_set1_ps(offset))) {}
        void pairs(const uint8_t* bytes, Vector* to) const {
            const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
            const __m512i wide = _mm512_cvtepu8_epi32(sixteen);
            to[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), values);
            to[1] = _mm512_permutexvar_ps(wide, values);
        }
    };
    using Integers = Levels;
};

#else

using Wide = Narrow;

#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define TRANSOM_BRAIN 1

struct Brain {
    static constexpr int lanes = 32;
    using Vector = __m512bh;
    using Sums = __m512;
    using Number = uint16_t;
    static constexpr Kind kind = kBFloat16;

    static Sums zero() { return _mm512_setzero_ps(); }
    static Vector load(const float* from) {
        return rounded(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
    }
    static Vector load(const uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); }
    static void store(uint16_t* to, Vector values) { _mm512_storeu_si512(to, (__m512i)values); }
    static Sums add(Vector a, Vector b, Sums c) { return _mm512_dpbf16_ps(c, a, b); }
    static float sum(Sums values) { return _mm512_reduce_add_ps(values); }

    static Vector rounded(__m512 first, __m512 second) {
        return _mm512_cvtne2ps_pbh(second, first);
    }
    static Vector bytes(const int8_t* from, float scale, float offset) {
        return rounded(Wide::bytes(from, scale, offset), Wide::bytes(from + 16, scale, offset));
    }
    static Vector floats(const int8_t* from, float scale, float offset) {
        return rounded(Wide::floats(from, scale, offset), Wide::floats(from + 16, scale, offset));
    }

    struct Levels {
        __m512i values;  // the same 16 levels twice
        Levels() = default;
        Levels(const float* levels, float scale, float offset) {
            const __m512 wide = Wide::Levels(levels, scale, offset).values;
            values = (__m512i)rounded(wide, wide);
        }
        // The codes in their order: the high half of a byte, then the low half.
        void pairs(const uint8_t* bytes, Vector* to) const {
            const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
            const __m512i wide = _mm512_cvtepu8_epi32(sixteen);
            const __m512i both =
                _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
            to[0] = (__m512bh)_mm512_permutexvar_epi16(both, values);
        }
    };
    using Integers = Levels;
};

#endif

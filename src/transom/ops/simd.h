// Vectors of float32 with the few operations that the products need.
//
// `Wide` is the vector of 16 numbers of AVX-512, `Narrow` one of 8 numbers: AVX2 where the compiler
// targets it, else a vector type of GCC and Clang, which they compile to NEON or SSE.
// Without AVX-512 `Wide` is `Narrow`.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

#if defined(__AVX2__) && defined(__FMA__)

struct Narrow {
    static constexpr int lanes = 8;
    using Floats = __m256;

    // The values of the 16 codes of 4 bits.
    struct Table {
        __m256 low, high;
        explicit Table(const float* levels)
            : low(_mm256_loadu_ps(levels)), high(_mm256_loadu_ps(levels + 8)) {}

        // Only the lowest 4 bits of an index count.
        Floats at(__m256i index) const {
            const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                    _mm256_permutevar8x32_ps(high, index), bit3);
        }
    };

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats all(float value) { return _mm256_set1_ps(value); }
    static Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }

    static float sum(Floats values) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
    }

    // The values of the codes in the high and in the low halves of 8 bytes.
    static void pairs(const uint8_t* bytes, const Table& table, Floats& high, Floats& low) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
        const __m256i wide = _mm256_cvtepu8_epi32(eight);
        high = table.at(_mm256_srli_epi32(wide, 4));
        low = table.at(wide);
    }

    static Floats bytes(const int8_t* from) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    }
};

#else

struct Narrow {
    static constexpr int lanes = 8;
    typedef float Floats __attribute__((vector_size(32)));
    typedef int8_t Bytes __attribute__((vector_size(8)));

    struct Table {
        float levels[16];
        explicit Table(const float* from) { std::memcpy(levels, from, sizeof levels); }
    };

    static Floats zero() { return Floats{}; }
    static Floats all(float value) { return Floats{} + value; }
    static Floats load(const float* from) {
        Floats values;
        std::memcpy(&values, from, sizeof values);
        return values;
    }
    static void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }
    static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
    static Floats multiply(Floats a, Floats b) { return a * b; }
    static Floats add(Floats a, Floats b) { return a + b; }

    static float sum(Floats values) {
        float total = 0;
        for (int lane = 0; lane < lanes; ++lane) total += values[lane];
        return total;
    }

    static void pairs(const uint8_t* bytes, const Table& table, Floats& high, Floats& low) {
        for (int lane = 0; lane < lanes; ++lane) {
            high[lane] = table.levels[bytes[lane] >> 4];
            low[lane] = table.levels[bytes[lane] & 15];
        }
    }

    static Floats bytes(const int8_t* from) {
        Bytes codes;
        std::memcpy(&codes, from, sizeof codes);
        return __builtin_convertvector(codes, Floats);
    }
};

#endif

#if defined(__AVX512F__)

struct Wide {
    static constexpr int lanes = 16;
    using Floats = __m512;

    struct Table {
        __m512 levels;
        explicit Table(const float* from) : levels(_mm512_loadu_ps(from)) {}
        Floats at(__m512i index) const { return _mm512_permutexvar_ps(index, levels); }
    };

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats all(float value) { return _mm512_set1_ps(value); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static float sum(Floats values) { return _mm512_reduce_add_ps(values); }

    static void pairs(const uint8_t* bytes, const Table& table, Floats& high, Floats& low) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
        const __m512i wide = _mm512_cvtepu8_epi32(sixteen);
        high = table.at(_mm512_srli_epi32(wide, 4));
        low = table.at(wide);
    }

    static Floats bytes(const int8_t* from) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
    }
};

#else

using Wide = Narrow;

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

// float32 of n numbers in float16.
inline void halves_to_floats(const uint16_t* from, float* to, int64_t n) {
    int64_t i = 0;
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(eight));
    }
#endif
    for (; i < n; ++i) to[i] = half_to_float(from[i]);
}

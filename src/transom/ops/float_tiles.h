// Products with codes in tiles that stand for floats: a table of 16 values, or floats of 8 bits.
//
// The values of the 16 outputs of a tile for one input become a vector, and float32 arithmetic adds
// their products with x.
//
// The layout of a table's codes is that of tiles.h. A lane has the codes of 8 inputs of one output,
// and one instruction looks up one of them in every lane. With `brain`, it looks up two of them in
// bfloat16, whose products are added in one instruction. Floats of 8 bits are ordered as scales
// are: [tile, input, 16].

#pragma once

#include <type_traits>

#include "simd.h"
#include "tiles.h"

#ifdef TRANSOM_TILES

// The inputs of the codes of a lane, from its lowest bits on.
constexpr int lane_inputs[] = {0, 4, 1, 5, 2, 6, 3, 7};

// Rows of x. Of rows that are multiplied at once, the numbers of each input lie side by side, or
// the pairs of numbers in bfloat16.
template <bool brain>
struct TurnedRows {
    static constexpr int words = brain ? 4 : 8;  // of 8 inputs
    std::vector<float> numbers;
    const float* x;
    int64_t count, inputs;

    void make(const float* from, int64_t rows, int64_t row_inputs, int threads) {
        x = from, count = rows, inputs = row_inputs;
        if (direct()) return;
        numbers.resize(rows * inputs / 8 * words);
        in_pool([this](int64_t row) { write_row(row); }, rows, rows < 4 ? 1 : threads);
    }

    // Where rows that are multiplied at once begin.
    const float* at(int64_t row) const {
        return direct() ? x : numbers.data() + row * inputs / 8 * words;
    }
    bool direct() const { return count == 1 && !brain; }

    void write_row(int64_t row) {
        const int64_t first = first_at_once(row, count), together = rows_at_once(count - first);
        float* to = numbers.data() + first * inputs / 8 * words + row - first;
        const float* from = x + row * inputs;
        for (int64_t i = 0; i < inputs; i += 8)
            for (int k = 0; k < words; ++k, to += together)
                *to = brain ? pair(from[i + lane_inputs[k]], from[i + lane_inputs[k + 4]])
                            : from[i + k];
    }

    // The bits of two numbers that bfloat16 has.
    static float pair(float low, float high) {
        uint32_t words[2];
        std::memcpy(words, &low, sizeof low);
        std::memcpy(words + 1, &high, sizeof high);
        words[0] = words[0] >> 16 | (words[1] & 0xffff0000);
        std::memcpy(&low, words, sizeof low);
        return low;
    }
};

// Codes of 4 bits: the values of a table.
template <bool brain>
struct Table {
    using Rows = TurnedRows<brain>;
    static constexpr int bit = 1 << (16 + brain);  // of `made`; lower ones are those of ByteTiles
    static constexpr int inputs = 8, words = Rows::words;  // of 64 bytes; numbers of x for them
    static constexpr float unit = 1;                       // the value of 1.0
    __m512i lanes;
#ifdef TRANSOM_BRAIN
    std::conditional_t<brain, Brain::Levels, Wide::Levels> levels;
#else
    Wide::Levels levels;
#endif

    explicit Table(const Weight& weight) : levels(weight.levels, 1, 0) {}
    void read(const uint8_t* codes) { lanes = _mm512_loadu_si512(codes); }
    static int place(int k) { return brain ? k : lane_inputs[k]; }

    // Only the lowest bits of an index count.
    __m512 at(int k) const {
        const __m512i index = _mm512_srli_epi32(lanes, 4 * k);
        if constexpr (brain) {
            return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, levels.values));
        } else {
            return _mm512_permutexvar_ps(index, levels.values);
        }
    }
    static __m512 add(__m512 a, __m512 b, __m512 c) {
#ifdef TRANSOM_BRAIN
        if constexpr (brain) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
        return _mm512_fmadd_ps(a, b, c);
    }
};

// Floats of 8 bits, none of them NaN. Their bits are those of a half, but for its bias.
struct Floats {
    using Rows = TurnedRows<false>;
    static constexpr int bit = 1 << 18;
    static constexpr int inputs = 4, words = 4;
    static constexpr float unit = 256;
    __m512i halves[2];

    explicit Floats(const Weight&) {}
    void read(const uint8_t* codes) {
        for (int part = 0; part < 2; ++part) {
            const auto* from = reinterpret_cast<const __m256i*>(codes + 32 * part);
            const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(from));
            halves[part] = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(-0x4080));
        }
    }
    static int place(int k) { return k; }
    __m512 at(int k) const {
        const __m512i both = halves[k / 2];
        return _mm512_cvtph_ps(k % 2 ? _mm512_extracti64x4_epi64(both, 1)
                                     : _mm512_castsi512_si256(both));
    }
    static __m512 add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
};

template <class Codes>
struct FloatTiles {
    using Rows = typename Codes::Rows;
    static constexpr int bit = Codes::bit;

    // Write the products of R rows with the 16 outputs of a tile, one vector per row.
    template <int R>
    static void products(const uint8_t* codes, const float* scales, const float*,
                         const Weight& weight, const Rows& rows, int64_t row, __m512* to) {
        constexpr int chains = R < 4 ? 4 / R : 1;  // sums side by side, to hide the latency
        Codes own(weight);
        const float* x = rows.at(row);
        __m512 sums[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_ps();
        for (int64_t begin = 0; begin < weight.inputs; begin += weight.group, scales += kTile) {
            __m512 totals[R][chains];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (auto& total : totals[r]) total = _mm512_setzero_ps();
            for (int64_t i = 0; i < weight.group; i += Codes::inputs, codes += 64) {
                own.read(codes);
                __builtin_prefetch(codes + 4096, 0, 2);
#pragma GCC unroll 8
                for (int k = 0; k < Codes::words; ++k) {
                    const __m512 values = own.at(k);
                    const float* of_x = x + Codes::place(k) * R;
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        __m512& total = totals[r][k % chains];
                        total = Codes::add(values, _mm512_set1_ps(of_x[r]), total);
                    }
                }
                x += Codes::words * R;
            }
            const __m512 scale =
                _mm512_mul_ps(_mm512_loadu_ps(scales), _mm512_set1_ps(Codes::unit));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
                for (int c = 1; c < chains; ++c)
                    totals[r][0] = _mm512_add_ps(totals[r][0], totals[r][c]);
                sums[r] = _mm512_fmadd_ps(totals[r][0], scale, sums[r]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) to[r] = sums[r];
    }
};

// Write the numbers of one row of a weight in floats of 8 bits.
inline void write_row_of_floats(const Weight& weight, int64_t row, float* to) {
    const int64_t tile = row / kTile, lane = row % kTile, groups = weight.inputs / weight.group;
    const auto* codes = static_cast<const uint8_t*>(weight.codes) + tile * kTile * weight.inputs;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t place = (tile * groups + g) * kTile + lane;
        const float scale = number_at(weight.scales, weight.scale_kind, place);
        for (int64_t i = g * weight.group; i < (g + 1) * weight.group; ++i)
            to[i] = float8_values[codes[i * kTile + lane]] * scale;
    }
}

#endif

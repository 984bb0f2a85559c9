// The inner loop of all products: R rows of x by O outputs of a weight, summed in registers.
//
// A source reads the numbers of a weight into vectors. It is one of the structs below, over a
// vector type V of simd.h. A step is as many inputs as a source reads at once.

#pragma once

#include <cstdint>

#include "simd.h"
#include "weights.h"

// Dense numbers of a kind.
template <class V, Kind kind>
struct Dense {
    using Vectors = V;
    static constexpr bool coded = false, streamed = true;
    static constexpr int step = V::lanes;
    struct Group {
        Group() = default;
        Group(const float*, float, float) {}
    };
    static const uint8_t* at(const uint8_t* row, int64_t i) {
        return row + i * (kind == kFloat32 ? 4 : 2);
    }
    static void read_step(const uint8_t* from, const Group&, typename V::Vector* to) {
        if constexpr (kind == V::kind) {
            to[0] = V::load(reinterpret_cast<const typename V::Number*>(from));
        } else if constexpr (kind == kFloat16) {
            to[0] = V::halves(reinterpret_cast<const uint16_t*>(from));
        } else {
            to[0] = V::brains(reinterpret_cast<const uint16_t*>(from));
        }
    }
};

// Codes of 8 bits of a kind, each times the scale of its group plus an offset.
template <class V, Kind kind>
struct Bytes {
    using Vectors = V;
    static constexpr bool coded = true, streamed = true;
    static constexpr int step = V::lanes;
    struct Group {
        float scale, offset;
        Group() = default;
        Group(const float*, float factor, float added) : scale(factor), offset(added) {}
    };
    static const uint8_t* at(const uint8_t* row, int64_t i) { return row + i; }
    static void read_step(const uint8_t* from, const Group& group, typename V::Vector* to) {
        const auto* codes = reinterpret_cast<const int8_t*>(from);
        if constexpr (kind == kInt8) {
            to[0] = V::bytes(codes, group.scale, group.offset);
        } else {
            to[0] = V::floats(codes, group.scale, group.offset);
        }
    }
};

// Codes of 4 bits. Where V::lanes bytes are two vectors, the first has the inputs with even places
// of the step, and the second those with odd places: x is brought into this order before.
template <class V, class Levels>
struct Nibbles {
    using Vectors = V;
    static constexpr bool coded = true, streamed = true;
    static constexpr int step = V::lanes == 32 ? 32 : 2 * V::lanes;
    using Group = Levels;
    static const uint8_t* at(const uint8_t* row, int64_t i) { return row + i / 2; }
    static void read_step(const uint8_t* from, const Group& group, typename V::Vector* to) {
        group.pairs(from, to);
    }
};

// Numbers that were written as V has them, vector by vector for `outputs` outputs in turn.
template <class V, int outputs>
struct Packed : Dense<V, V::kind> {
    static constexpr bool streamed = false;
    static const uint8_t* at(const uint8_t* row, int64_t i) {
        return row + i * outputs * sizeof(typename V::Number);
    }
};

// What a tile reads of each output: its numbers, and the scales and offsets of its groups.
struct Output {
    const uint8_t* row;
    const float *scales, *offsets;
};

// Inputs [begin, end) of a weight with groups of so many inputs.
struct Inputs {
    int64_t begin, end, group;
};

// Keep a vector in a register. Otherwise compilers load it again for every product, and there are
// fewer loads than products in a cycle.
template <class Vector>
inline void keep(Vector& values) {
#if defined(__AVX512F__)
    asm("" : "+v"(values));
#elif defined(__AVX2__)
    asm("" : "+x"(values));
#endif
}

// Add the products of R rows of x with O outputs to totals[r * O + o], or set them at the first
// inputs.
//
// x has the vectors of R rows in turn. The inputs are full groups, and a group is full steps. The
// numbers `ahead` bytes after those of this tile are fetched into the cache meanwhile.
template <class S, int R, int O>
inline void tile(const typename S::Vectors::Number* x, const Output* outputs, const float* levels,
                 Inputs inputs, int64_t ahead, typename S::Vectors::Sums* totals) {
    using V = typename S::Vectors;
    constexpr int parts = S::step / V::lanes;
    // Steps of few bytes fetch once for each group: one fetch takes 64 bytes.
    constexpr bool by_group = S::coded && V::lanes == 8;
    typename V::Sums total[R][O];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int o = 0; o < O; ++o) total[r][o] = inputs.begin ? totals[r * O + o] : V::zero();
    x += inputs.begin * R;
    int64_t g = S::coded ? inputs.begin / inputs.group : 0;
    for (int64_t i = inputs.begin; i < inputs.end; ++g) {
        typename S::Group of[O];
#pragma GCC unroll 16
        for (int o = 0; o < O && S::coded; ++o) {
            of[o] = typename S::Group(levels, outputs[o].scales[g], outputs[o].offsets[g]);
        }
        const int64_t end = S::coded ? i + inputs.group : inputs.end;
#pragma GCC unroll 16
        for (int o = 0; o < O && by_group; ++o) {
            const uint8_t* next = S::at(outputs[o].row, i) + ahead;
            const uint8_t* last = S::at(outputs[o].row, end) + ahead;
            for (; next < last; next += 64) __builtin_prefetch(next, 0, 2);
        }
        for (; i < end; i += S::step, x += R * S::step) {
            typename V::Vector weights[O][parts];
#pragma GCC unroll 16
            for (int o = 0; o < O; ++o) {
                const uint8_t* from = S::at(outputs[o].row, i);
                if (S::streamed && !by_group) __builtin_prefetch(from + ahead, 0, 2);
                S::read_step(from, of[o], weights[o]);
            }
#pragma GCC unroll 16
            for (int part = 0; part < parts; ++part)
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    auto of_x = V::load(x + (part * R + r) * V::lanes);
                    keep(of_x);
#pragma GCC unroll 16
                    for (int o = 0; o < O; ++o)
                        total[r][o] = V::add(weights[o][part], of_x, total[r][o]);
                }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int o = 0; o < O; ++o) totals[r * O + o] = total[r][o];
}

// The numbers of a weight one at a time, and the scales and offsets of one output in float32.

#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"
#include "weights.h"

inline float number_at(const void* from, int64_t kind, int64_t i) {
    switch (kind) {
        case kFloat32: return static_cast<const float*>(from)[i];
        case kFloat16: return half_to_float(static_cast<const uint16_t*>(from)[i]);
        case kInt8: return float(static_cast<const int8_t*>(from)[i]);
        case kFloat8: return float8_values[static_cast<const uint8_t*>(from)[i]];
        default: return brain_to_float(static_cast<const uint16_t*>(from)[i]);
    }
}

// The value of the code, or the dense number, at input i of an output.
inline float value_at(const Weight& weight, int64_t output, int64_t i) {
    const int64_t place = output * weight.inputs + i;
    if (weight.storage != kInt4) return number_at(weight.codes, weight.storage, place);
    const uint8_t pair = static_cast<const uint8_t*>(weight.codes)[place / 2];
    return weight.levels[i % 2 ? pair & 15 : pair >> 4];
}

// Whether the values of 16 codes are integers in a row.
inline bool in_a_row(const float* levels) {
    for (int code = 1; code < 16; ++code)
        if (levels[code] != levels[0] + float(code)) return false;
    return true;
}

inline int64_t row_bytes(const Weight& weight) {
    switch (weight.storage) {
        case kFloat32: return weight.inputs * 4;
        case kInt8:
        case kFloat8: return weight.inputs;
        case kInt4: return weight.inputs / 2;
        default: return weight.inputs * 2;
    }
}

// Write the scales or minimums of one output in float32.
inline void widen(const Weight& weight, const void* from, const void* super, bool centered,
                  int64_t output, float* to) {
    const int64_t groups = weight.inputs / weight.group, first = output * groups;
    int64_t g = 0;
    if (weight.scale_kind == kFloat16) {
        const auto* halves = static_cast<const uint16_t*>(from) + first;
        for (; g + Wide::lanes <= groups; g += Wide::lanes)
            Wide::store(to + g, Wide::halves(halves + g));
    }
    for (; g < groups; ++g) to[g] = number_at(from, weight.scale_kind, first + g);
    if (!weight.block) return;
    const float mean = centered ? number_at(weight.scale_mean, weight.super_kind, 0) : 0.0f;
    for (g = 0; g < groups;) {
        const int64_t place = (first + g) / weight.block;
        const float factor = number_at(super, weight.super_kind, place);
        const int64_t end = std::min(groups, (place + 1) * weight.block - first);
        for (; g < end; ++g) to[g] = to[g] * factor + mean;
    }
}

// Write what multiplies the values of the codes and what is added, in every group of an output.
inline void widen_factors(const Weight& weight, int64_t output, float* scales, float* offsets) {
    const int64_t groups = weight.inputs / weight.group;
    widen(weight, weight.scales, weight.super_scales, weight.scale_mean, output, scales);
    if (weight.minimums) {
        widen(weight, weight.minimums, weight.super_minimums, false, output, offsets);
    } else if (weight.zeros) {
        const int8_t* zeros = weight.zeros + output * groups;
        for (int64_t g = 0; g < groups; ++g) offsets[g] = -scales[g] * float(zeros[g]);
    } else {
        std::fill(offsets, offsets + groups, 0.0f);
    }
}

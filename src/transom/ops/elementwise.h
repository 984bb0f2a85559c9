// What a block computes on single rows in float32: norms, rotation, activations, softmax.
//
// The numbers that come from tensors may have other dtypes, and are widened when they are read.
// Nothing hides a NaN: it passes through every function.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"
#include "weights.h"

// Numbers of a tensor with a dtype; see `Kind`.
struct Numbers {
    const void* data;  // null if there are none
    int64_t kind;
};

inline uint16_t float_to_brain(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t float_to_half(float value) {  // to nearest, ties to even
#if defined(__F16C__)
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (rest < 0x38800000) {  // subnormal: a multiple of 2^-24
        float size;
        std::memcpy(&size, &rest, sizeof size);
        return uint16_t(sign | uint32_t(std::nearbyint(size * 16777216.0f)));
    }
    return uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
#endif
}

// Write n numbers of a tensor, from the first one on, in float32.
inline void read_floats(Numbers from, int64_t first, float* to, int64_t n) {
    if (from.kind == kFloat32) {
        std::memcpy(to, static_cast<const float*>(from.data) + first, n * sizeof(float));
    } else if (from.kind == kFloat16) {
        const uint16_t* bits = static_cast<const uint16_t*>(from.data) + first;
        int64_t i = 0;
        for (; i + Wide::lanes <= n; i += Wide::lanes) Wide::store(to + i, Wide::halves(bits + i));
        for (; i < n; ++i) to[i] = half_to_float(bits[i]);
    } else {
        const uint16_t* bits = static_cast<const uint16_t*>(from.data) + first;
        int64_t i = 0;
        for (; i + Wide::lanes <= n; i += Wide::lanes) Wide::store(to + i, Wide::brains(bits + i));
        for (; i < n; ++i) to[i] = brain_to_float(bits[i]);
    }
}

// Write n numbers of float32 into a tensor of a dtype, from the first one on.
inline void write_floats(const float* from, int64_t n, void* to, int64_t kind, int64_t first) {
    if (kind == kFloat32) {
        std::memcpy(static_cast<float*>(to) + first, from, n * sizeof(float));
    } else if (kind == kFloat16) {
        uint16_t* bits = static_cast<uint16_t*>(to) + first;
        for (int64_t i = 0; i < n; ++i) bits[i] = float_to_half(from[i]);
    } else {
        uint16_t* bits = static_cast<uint16_t*>(to) + first;
        for (int64_t i = 0; i < n; ++i) bits[i] = float_to_brain(from[i]);
    }
}

// x as a number of a dtype.
inline float rounded(float x, int64_t kind) {
    if (kind == kFloat16) return half_to_float(float_to_half(x));
    return kind == kBFloat16 ? brain_to_float(float_to_brain(x)) : x;
}

// Round to numbers of bfloat16, which are multiplied faster.
inline void round_to_brain(float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = brain_to_float(float_to_brain(x[i]));
}

// exp(x) with a relative error of 2e-7; 0 below -87, where float32 is subnormal.
inline float exp_of(float x) {
    const float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;  // a NaN stays
    const float shifted = bounded * 1.44269504f + 12582912.0f;         // rounds to an integer
    const float turns = shifted - 12582912.0f;
    const float rest = (bounded - turns * 0.693359375f) + turns * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;  // 2^turns: the integer is in the low bits
    float power;
    std::memcpy(&power, &bits, sizeof power);
    const float value = sum * power;
    return x < -87.0f ? 0.0f : x > 88.0f ? INFINITY : value;
}

inline float tanh_of(float x) {
    const float size = 2.0f / (exp_of(2.0f * x) + 1.0f);
    return 1.0f - size;
}

inline float dot(const float* a, const float* b, int64_t n) {
    Wide::Sums total = Wide::zero();
    int64_t i = 0;
    for (; i + Wide::lanes <= n; i += Wide::lanes) {
        total = Wide::add(Wide::load(a + i), Wide::load(b + i), total);
    }
    float sum = Wide::sum(total);
    for (; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

enum NormKind : int64_t { kNoNorm, kRms, kRmsPlusOne, kLayer };

// The same fields in the same order as `NormArgs` in block.py.
struct Norm {
    int64_t kind;
    Numbers weight, bias;  // [width]; a norm may have no weight, and only kLayer has a bias
    double eps;
};

// Norm one row of `width` numbers. x and y may be the same.
inline void norm_row(const Norm& norm, const float* x, float* y, int64_t width) {
    static thread_local std::vector<float> buffer;
    buffer.resize(2 * width);
    float *weight = buffer.data(), *bias = weight + width;
    float mean = 0;
    if (norm.kind == kLayer) {
        double sum = 0;
        for (int64_t i = 0; i < width; ++i) sum += x[i];
        mean = float(sum / double(width));
        for (int64_t i = 0; i < width; ++i) y[i] = x[i] - mean;
    } else if (y != x) {
        std::memcpy(y, x, width * sizeof(float));
    }
    const float factor = 1.0f / std::sqrt(dot(y, y, width) / float(width) + float(norm.eps));
    if (!norm.weight.data) {
        for (int64_t i = 0; i < width; ++i) y[i] *= factor;
        return;
    }
    read_floats(norm.weight, 0, weight, width);
    if (norm.kind == kRmsPlusOne) {
        for (int64_t i = 0; i < width; ++i) weight[i] += 1.0f;
    }
    for (int64_t i = 0; i < width; ++i) y[i] = y[i] * factor * weight[i];
    if (norm.kind != kLayer) return;
    read_floats(norm.bias, 0, bias, width);
    for (int64_t i = 0; i < width; ++i) y[i] += bias[i];
}

// Rotate the first 2 * pairs features of one head. `halves` pairs (m, m + pairs), otherwise
// neighbours (2m, 2m + 1) are a pair.
inline void rotate_head(float* x, const float* cos, const float* sin, int64_t pairs, bool halves) {
    if (halves) {
        for (int64_t m = 0; m < pairs; ++m) {
            const float a = x[m], b = x[m + pairs];
            x[m] = a * cos[m] - b * sin[m];
            x[m + pairs] = b * cos[m] + a * sin[m];
        }
        return;
    }
    for (int64_t m = 0; m < pairs; ++m) {
        const float a = x[2 * m], b = x[2 * m + 1];
        x[2 * m] = a * cos[m] - b * sin[m];
        x[2 * m + 1] = b * cos[m] + a * sin[m];
    }
}

enum Activation : int64_t { kSilu, kGelu, kGeluTanh, kRelu, kClamped };

// gate <- act(gate) * value, or act(gate) if there is no value. kClamped is the product of gpt-oss,
// whose gate and value are at most `limit`.
inline void activate(int64_t kind, float* gate, const float* value, int64_t n, float limit) {
    if (kind == kClamped) {
        for (int64_t i = 0; i < n; ++i) {
            const float g = gate[i] > limit ? limit : gate[i];
            const float v = value[i] > limit ? limit : value[i] < -limit ? -limit : value[i];
            gate[i] = (v + 1.0f) * g / (1.0f + exp_of(-1.702f * g));
        }
        return;
    }
    switch (kind) {
        case kSilu:
            for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + exp_of(-gate[i]));
            break;
        case kGelu:
            for (int64_t i = 0; i < n; ++i)
                gate[i] = 0.5f * gate[i] * (1.0f + std::erf(gate[i] * 0.70710678f));
            break;
        case kGeluTanh:
            for (int64_t i = 0; i < n; ++i) {
                const float x = gate[i];
                const float inner = 0.79788456f * (x + 0.044715f * x * x * x);
                gate[i] = x / (1.0f + exp_of(-2.0f * inner));  // 0.5 x (1 + tanh(inner))
            }
            break;
        default:
            for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] < 0.0f ? 0.0f : gate[i];
    }
    if (value) {
        for (int64_t i = 0; i < n; ++i) gate[i] *= value[i];
    }
}

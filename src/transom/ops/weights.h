// Weights as the C++ code sees them, and products of a few rows with them.
//
// How to call it from another file of this folder:
//
//     const Weight* qkv[] = {&block.wq, &block.wk, &block.wv};
//     float* to[] = {q, k, v};
//     multiply(x, rows, qkv, 3, to, threads);                // q = x Wq^T + bq, and so on
//     const Weight* out[] = {&block.wo};
//     multiply(heads, rows, out, 1, &hidden, threads, true);  // hidden += heads Wo^T + bo
//
// Weights of one call read the same x, so they have the same `inputs`. They share one parallel
// region of the pool, and what is done to x is done once for them: more weights in one call are
// faster. A call from a function that itself runs in the pool stays on one thread.
//
// From 4 rows on, processors with bfloat16 instructions are twice as fast if x has no bits that
// bfloat16 lacks, and the weight is dense bfloat16 or codes with `rounded`. `multiply` looks at x
// itself: a caller in a bfloat16 model only rounds x to bfloat16 before, as PyTorch does.

#pragma once

#include <cstdint>

// How numbers are stored. `transom/ops/weights.py` has the same numbers.
enum Kind : int64_t { kFloat32, kFloat16, kBFloat16, kInt8, kFloat8, kInt4 };

// A weight W [outputs, inputs]: dense numbers, or the parts of transom/quantize/formats.py.
// The same fields in the same order as `Weight` in transom/ops/weights.py, which fills them.
// Nothing in it is owned: Python keeps the tensors.
struct Weight {
    const void* codes;    // [outputs, inputs] of `storage`; kInt4: uint8 [outputs, inputs / 2]
    const float* levels;  // the values of the 16 codes of kInt4, else null
    const void* scales;   // [outputs, inputs / group] of `scale_kind`; null for dense numbers
    const void* super_scales;
    const void* scale_mean;
    const int8_t* zeros;   // [outputs, inputs / group], or null
    const void* minimums;  // [outputs, inputs / group], or null
    const void* super_minimums;
    const float* bias;     // [outputs], or null
    const int32_t* order;  // [inputs]: the input of each column of the codes; null: in order
    int64_t outputs, inputs, group;
    int64_t storage;  // kFloat32, kFloat16, kBFloat16: dense; kInt8, kFloat8, kInt4: codes
    int64_t scale_kind, super_kind;
    int64_t block;    // scales that share a super scale, or 0
    int64_t rounded;  // 1: numbers of codes may be rounded to bfloat16, as in a bfloat16 model
    int64_t tiled;    // 1: codes, scales and what belongs to them are in tiles (tiles.h)
};

// Compute y[i] = x W_i^T + b_i for `count` weights, or add it to y[i].
//
// x is float32 [rows, inputs], y[i] is float32 [rows, outputs of W_i], both without gaps. They must
// not overlap. Any number of rows is right; up to about 64 are fast. All sums are float32.
// Throws std::bad_alloc if there is no memory for a copy of x; then y is not complete.
void multiply(const float* x, int64_t rows, const Weight* const* weights, int count,
              float* const* y, int threads, bool accumulate = false);

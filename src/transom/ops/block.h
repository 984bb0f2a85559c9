// What one call of `transom_blocks` reads: the blocks of a model, and the rows that pass them.
//
// The structures have the same fields in the same order as those in transom/ops/block.py, which
// fills them. Nothing in them is owned: Python keeps the tensors.

#pragma once

#include <cstdint>

#include "attend.h"
#include "elementwise.h"
#include "weights.h"

// w_out(act(w_gate x) * w_value x), or w_out(act(w_value x)) without a gate.
struct FeedForward {
    Weight gate, value, out;
    int64_t gated, activation, hidden;
    double limit;  // of kClamped
};

enum Routing : int64_t { kSoftmax, kSigmoid, kBiasedSigmoid };

struct Experts {
    Weight router;
    Numbers choice_bias;         // [count], or none
    const FeedForward* experts;  // [count]
    const FeedForward* shared;   // or null
    int64_t count, active, routing, normalize, groups, active_groups;
    double scale;
};

struct Block {
    Norm attention_norm, attention_post_norm, ffn_norm, ffn_post_norm, q_norm, k_norm;
    Weight wq, wk, wv, wo;
    FeedForward feed_forward;
    const Experts* experts;  // in place of `feed_forward`, or null
    Numbers sinks;           // [heads], or none
    int64_t dim, heads, kv_heads, head_dim;
    int64_t norm_heads;   // q_norm and k_norm: each head alone, or all heads together
    int64_t norm_rotated; // queries and keys have a norm without a weight after the rotation
    int64_t halves;       // the layout of rotary pairs
    double scale, softcap, norm_eps;  // no soft cap is 0
};

// cos and sin of the rows: [rows, pairs] each.
struct Rotation {
    const float *cos, *sin;
    int64_t pairs;
};

// One block in one call.
struct Layer {
    const Block* block;
    States keys, values;
    const Slots* slots;
    const Rotation* rotation;  // or null
    const float* temperature;  // [rows], a factor on queries; or null
};

struct Call {
    void* x;        // [rows, dim], the residual stream, which is replaced
    int64_t kind;   // of x
    int64_t rows, tokens;      // rows of all sequences; tokens of each sequence
    const int64_t* positions;  // [rows]; -1 is padding, which stays as it is and is not stored
    int64_t threads;
    const Norm* norm;  // after the last block, or null
};

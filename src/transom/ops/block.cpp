// The blocks of a model on a few rows, with a KV cache: what layers/block.py computes.
//
// The residual stream stays in float32 from the first block of a call to its last one, and so does
// everything else. Rows of padding are left out.

#include "block.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "threads.h"

namespace {

// Call work(row) for every row, on several threads if there are some rows.
template <class Work>
void each_row(int64_t rows, int threads, const Work& work) {
    in_pool(work, rows, rows < 4 ? 1 : threads);
}

// Numbers that are not initialized.
struct Buffer {
    std::vector<float> numbers;
    float* of(int64_t count) {
        if (int64_t(numbers.size()) < count) numbers.resize(count);
        return numbers.data();
    }
};

// The buffers of a thread that calls; they keep their memory.
struct Buffers {
    Buffer x, normed, y, q, k, v, heads;
    Buffer gate, value, expert_x, expert_y, scores;
    std::vector<std::vector<int32_t>> slots;
};

struct Run {
    const Call& call;
    Buffers& buffers;
    std::vector<int64_t> rows, sequences;  // of the call: the rows that are not padding
    int64_t count = 0;                     // of these rows
    int threads;
    float *x = nullptr, *normed = nullptr;
    const Slots* seen = nullptr;  // the slots in `visible`
    std::vector<const std::vector<int32_t>*> visible;

    Run(const Call& given, Buffers& kept)
        : call(given), buffers(kept), threads(int(given.threads)) {}

    void layers(const Layer* layers, int64_t number) {
        const int64_t dim = layers[0].block->dim;
        for (int64_t row = 0; row < call.rows; ++row) {
            if (call.positions[row] < 0) continue;
            rows.push_back(row);
            sequences.push_back(row / call.tokens);
        }
        count = int64_t(rows.size());
        if (!count) return;
        x = buffers.x.of(count * dim);
        normed = buffers.normed.of(count * dim);
        const Numbers residual{call.x, call.kind};
        for (int64_t i = 0; i < count; ++i) read_floats(residual, rows[i] * dim, x + i * dim, dim);
        for (int64_t i = 0; i < number; ++i) {
            attention(layers[i]);
            feed_forward(*layers[i].block);
        }
        for (int64_t i = 0; i < count; ++i) {
            float* row = x + i * dim;
            if (call.norm) norm_row(*call.norm, row, row, dim);
            write_floats(row, dim, call.x, call.kind, rows[i] * dim);
        }
    }

    // The rows with a norm, or as they are, as products read them.
    const float* before(const Norm& norm, int64_t dim) {
        each_row(count, threads, [&](int64_t i) {
            float *from = x + i * dim, *to = normed + i * dim;
            if (norm.kind == kNoNorm) {
                std::copy(from, from + dim, to);
            } else {
                norm_row(norm, from, to, dim);
            }
            round(to, dim);
        });
        return normed;
    }

    // In a model of bfloat16, products read rows of bfloat16 as in PyTorch.
    void round(float* row, int64_t n) const {
        if (call.kind == kBFloat16) round_to_brain(row, n);
    }

    // x += norm(y)
    void add(const Norm& norm, float* y, int64_t dim) {
        each_row(count, threads, [&](int64_t i) {
            float *from = y + i * dim, *to = x + i * dim;
            if (norm.kind != kNoNorm) norm_row(norm, from, from, dim);
            for (int64_t j = 0; j < dim; ++j) to[j] += from[j];
        });
    }

    void attention(const Layer& layer) {
        const Block& block = *layer.block;
        const int64_t width = block.head_dim;
        const int64_t q_width = block.heads * width, kv_width = block.kv_heads * width;
        float *q = buffers.q.of(count * q_width), *k = buffers.k.of(count * kv_width);
        float* v = buffers.v.of(count * kv_width);
        const Weight* weights[] = {&block.wq, &block.wk, &block.wv};
        float* to[] = {q, k, v};
        multiply(before(block.attention_norm, block.dim), count, weights, 3, to, threads);
        each_row(count, threads, [&](int64_t i) {
            float *of_q = q + i * q_width, *of_k = k + i * kv_width;
            prepare(layer, i, of_q, block.heads, block.q_norm);
            prepare(layer, i, of_k, block.kv_heads, block.k_norm);
            float scale = float(block.scale);
            if (layer.temperature) scale *= layer.temperature[rows[i]];
            for (int64_t j = 0; j < q_width; ++j) of_q[j] *= scale;
            const int64_t slot = layer.slots->written[rows[i]];
            layer.keys.write(of_k, sequences[i], slot, width);
            layer.values.write(v + i * kv_width, sequences[i], slot, width);
        });
        see(*layer.slots);
        Attend attend{};
        attend.queries = q;
        attend.out = buffers.heads.of(count * q_width);
        attend.keys = layer.keys;
        attend.values = layer.values;
        attend.sequences = sequences.data();
        attend.slots = visible.data();
        attend.sinks = block.sinks;
        attend.rows = count;
        attend.heads = block.heads;
        attend.kv_heads = block.kv_heads;
        attend.width = width;
        attend.softcap = float(block.softcap);
        attend.threads = threads;
        attend.run();
        round(attend.out, count * q_width);
        project(block.wo, attend.out, block.attention_post_norm, block.dim);
    }

    // The norms and the rotation of the heads of a query or key.
    void prepare(const Layer& layer, int64_t i, float* x, int64_t heads, const Norm& norm) const {
        const Block& block = *layer.block;
        const int64_t width = block.head_dim;
        if (norm.kind != kNoNorm && !block.norm_heads) norm_row(norm, x, x, heads * width);
        for (int64_t head = 0; head < heads; ++head) {
            float* at = x + head * width;
            if (norm.kind != kNoNorm && block.norm_heads) norm_row(norm, at, at, width);
            if (const Rotation* table = layer.rotation) {
                const int64_t first = rows[i] * table->pairs;
                rotate_head(at, table->cos + first, table->sin + first, table->pairs, block.halves);
            }
            if (block.norm_rotated) norm_row({kRms, {}, {}, block.norm_eps}, at, at, width);
        }
    }

    // Find the slots that each row sees, unless the layer before had the same.
    void see(const Slots& slots) {
        if (seen == &slots) return;
        seen = &slots;
        if (int64_t(buffers.slots.size()) < count) buffers.slots.resize(count);
        visible.clear();
        for (int64_t i = 0; i < count; ++i) {
            visible_slots(slots, sequences[i], call.positions[rows[i]], buffers.slots[i]);
            visible.push_back(&buffers.slots[i]);
        }
    }

    // x += norm(from W^T + b)
    void project(const Weight& weight, const float* from, const Norm& norm, int64_t dim) {
        const Weight* weights[] = {&weight};
        const bool direct = norm.kind == kNoNorm;
        float* to[] = {direct ? x : buffers.y.of(count * dim)};
        multiply(from, count, weights, 1, to, threads, direct);
        if (!direct) add(norm, to[0], dim);
    }

    void feed_forward(const Block& block) {
        const float* from = before(block.ffn_norm, block.dim);
        if (block.experts) {
            float* y = buffers.y.of(count * block.dim);
            experts(*block.experts, from, y, block.dim);
            add(block.ffn_post_norm, y, block.dim);
            return;
        }
        const float* made = hidden(block.feed_forward, from, count);
        project(block.feed_forward.out, made, block.ffn_post_norm, block.dim);
    }

    // What the last product of a feed-forward multiplies: [number, hidden].
    const float* hidden(const FeedForward& ffn, const float* from, int64_t number) {
        float* gate = buffers.gate.of(number * ffn.hidden);
        float* value = buffers.value.of(number * ffn.hidden);
        const Weight* weights[] = {&ffn.gate, &ffn.value};
        float* to[] = {gate, value};
        if (ffn.gated) {
            multiply(from, number, weights, 2, to, threads);
        } else {
            multiply(from, number, weights + 1, 1, to, threads);
        }
        each_row(number, threads, [&](int64_t i) {
            const int64_t first = i * ffn.hidden;
            const float* factor = ffn.gated ? value + first : nullptr;
            activate(ffn.activation, gate + first, factor, ffn.hidden, float(ffn.limit));
            round(gate + first, ffn.hidden);
        });
        return gate;
    }

    void experts(const Experts& moe, const float* from, float* y, int64_t dim);
    void choose(const Experts& moe, const float* logits, int64_t* ids, float* weights) const;
};

// The sum of what the chosen experts compute: y [count, dim].
void Run::experts(const Experts& moe, const float* from, float* y, int64_t dim) {
    float* logits = buffers.scores.of(count * moe.count);
    const Weight* router[] = {&moe.router};
    multiply(from, count, router, 1, &logits, threads);
    std::vector<int64_t> ids(count * moe.active);
    std::vector<float> weights(count * moe.active);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t first = i * moe.active;
        choose(moe, logits + i * moe.count, ids.data() + first, weights.data() + first);
    }
    std::fill(y, y + count * dim, 0.0f);
    float* given = buffers.expert_x.of(count * dim);
    float* made = buffers.expert_y.of(count * dim);
    for (int64_t expert = 0; expert < moe.count; ++expert) {
        std::vector<int64_t> places;  // in `ids`
        for (int64_t j = 0; j < count * moe.active; ++j)
            if (ids[j] == expert) places.push_back(j);
        const int64_t number = int64_t(places.size());
        if (!number) continue;
        const bool on_inputs = moe.routing == kSigmoid;  // Llama 4 scales the inputs of experts
        for (int64_t j = 0; j < number; ++j) {
            const float factor = on_inputs ? weights[places[j]] : 1.0f;
            const float* row = from + places[j] / moe.active * dim;
            for (int64_t d = 0; d < dim; ++d) given[j * dim + d] = row[d] * factor;
            round(given + j * dim, dim);
        }
        const FeedForward& ffn = moe.experts[expert];
        const Weight* out[] = {&ffn.out};
        multiply(hidden(ffn, given, number), number, out, 1, &made, threads);
        for (int64_t j = 0; j < number; ++j) {
            const float factor = on_inputs ? 1.0f : weights[places[j]];
            float* row = y + places[j] / moe.active * dim;
            for (int64_t d = 0; d < dim; ++d) row[d] += made[j * dim + d] * factor;
        }
    }
    if (!moe.shared) return;
    const Weight* out[] = {&moe.shared->out};
    multiply(hidden(*moe.shared, from, count), count, out, 1, &y, threads, true);
}

// The experts of one row, best first, and their weights.
void Run::choose(const Experts& moe, const float* logits, int64_t* ids, float* weights) const {
    const int64_t count = moe.count;
    std::vector<float> scores(count), wanted(logits, logits + count);
    float greatest = -INFINITY, sum = 0;
    for (int64_t e = 0; e < count; ++e) greatest = std::max(greatest, logits[e]);
    for (int64_t e = 0; e < count; ++e) {
        if (moe.routing == kSoftmax) {
            sum += scores[e] = std::exp(logits[e] - greatest);
        } else {
            scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
        }
    }
    for (int64_t e = 0; moe.routing == kSoftmax && e < count; ++e) scores[e] /= sum;
    if (moe.choice_bias.data) {
        read_floats(moe.choice_bias, 0, wanted.data(), count);
        for (int64_t e = 0; e < count; ++e) wanted[e] += scores[e];
    }
    // Positions of the n greatest numbers, in this order; the first one of equals comes first.
    const auto best = [](const std::vector<float>& of, int64_t n) {
        std::vector<int64_t> order(of.size());
        for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
            // As in PyTorch, a NaN counts as the greatest number.
            return of[b] == of[b] && (of[a] != of[a] || of[a] > of[b]);
        });
        order.resize(n);
        return order;
    };
    if (moe.groups > 1) {
        const int64_t size = count / moe.groups;
        std::vector<float> sums(moe.groups);
        for (int64_t g = 0; g < moe.groups; ++g) {
            const std::vector<float> own(&wanted[g * size], &wanted[g * size] + size);
            for (int64_t e : best(own, 2)) sums[g] += own[e];
        }
        std::vector<bool> open(moe.groups);
        for (int64_t g : best(sums, moe.active_groups)) open[g] = true;
        for (int64_t e = 0; e < count; ++e)
            if (!open[e / size]) wanted[e] = -INFINITY;
    }
    const std::vector<int64_t> chosen = best(wanted, moe.active);
    float total = 0;
    for (int64_t a = 0; a < moe.active; ++a) {
        ids[a] = chosen[a];
        total += weights[a] = scores[chosen[a]];
    }
    for (int64_t a = 0; a < moe.active; ++a) {
        if (moe.normalize && moe.routing != kSigmoid) weights[a] /= total + 1e-20f;
        if (moe.routing == kBiasedSigmoid) weights[a] *= float(moe.scale);
    }
}

}  // namespace

extern "C" {

// Compute so many blocks, one after the other. Return 0, or 1 if there was no memory.
int transom_blocks(const Call* call, const Layer* layers, int64_t number) {
    static thread_local Buffers buffers;
    try {
        Run(*call, buffers).layers(layers, number);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
}

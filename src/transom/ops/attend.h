// Attention of few queries to the slots of a KV cache, with a running softmax in float32.
//
// The work is split over queries and, where a row sees many slots, over parts of these slots, or
// else over key/value heads. The parts of a query are merged at the end. A task reads the slots in
// order and asks for the next ones early, since their heads lie far apart in memory.

#pragma once

#include <algorithm>
#include <vector>

#include "elementwise.h"
#include "threads.h"

// The same fields in the same order as `SlotsArgs` in block.py: where the rows of a call write into
// one kind of store, and what they may attend to by one mask rule.
struct Slots {
    const int64_t* written;    // [rows], the slot of each row
    const int64_t* positions;  // [batch, position_stride], of all slots; -1 is an empty one
    int64_t position_stride, shown;  // slots that queries read
    int64_t window;                  // keys that a query sees, or 0 for all earlier ones
    int64_t chunk;                   // the same for the length of chunks
};

// The slots that one query sees by a rule: that of attention/mask.py.
inline void visible_slots(const Slots& slots, int64_t sequence, int64_t position,
                          std::vector<int32_t>& found) {
    found.resize(slots.shown);
    const int64_t* positions = slots.positions + sequence * slots.position_stride;
    int64_t first = 0;
    if (slots.window) first = std::max<int64_t>(0, position - slots.window + 1);
    if (slots.chunk) first = position / slots.chunk * slots.chunk;
    int64_t count = 0;
    for (int64_t slot = 0; slot < slots.shown; ++slot) {
        found[count] = int32_t(slot);
        count += positions[slot] >= first && positions[slot] <= position;
    }
    found.resize(count);
}

// Where the keys or values of one layer are: [batch, slots, heads, width]. Codes of 8 bits have a
// scale for each slot and head: cache/codes.py.
struct States {
    Numbers numbers;
    float* scales;                         // [batch, slots, heads] of kInt8, else null
    int64_t sequence_stride, slot_stride;  // in numbers
    int64_t dtype;                         // of the states that codes stand for

    // Ask for all heads of a slot.
    void prefetch(int64_t sequence, int64_t slot, int64_t head, int64_t numbers) const {
        const int64_t kind = this->numbers.kind;
        const int64_t size = kind == kFloat32 ? 4 : kind == kInt8 ? 1 : 2;
        const char* at = static_cast<const char*>(this->numbers.data) +
                         (sequence * sequence_stride + slot * slot_stride + head) * size;
        for (int64_t byte = 0; byte < numbers * size; byte += 64) __builtin_prefetch(at + byte);
    }

    // The numbers of some heads in float32: in place, or written to a buffer.
    const float* at(int64_t sequence, int64_t slot, int64_t head, int64_t heads, int64_t width,
                    float* to) const {
        const int64_t first = sequence * sequence_stride + slot * slot_stride + head * width;
        if (numbers.kind == kFloat32) return static_cast<const float*>(numbers.data) + first;
        if (numbers.kind != kInt8) {
            read_floats(numbers, first, to, heads * width);
            return to;
        }
        const int8_t* codes = static_cast<const int8_t*>(numbers.data) + first;
        for (int64_t start = 0; start < heads * width; start += width) {
            const float scale = scales[(first + start) / width];
            for (int64_t i = start; i < start + width; ++i) to[i] = float(codes[i]) * scale;
        }
        return to;
    }

    void write(const float* from, int64_t sequence, int64_t slot, int64_t width) const {
        const int64_t first = sequence * sequence_stride + slot * slot_stride;
        if (numbers.kind == kInt8) return write_codes(from, first, width);
        write_floats(from, slot_stride, const_cast<void*>(numbers.data), numbers.kind, first);
    }

    void write_codes(const float* from, int64_t first, int64_t width) const {
        int8_t* codes = static_cast<int8_t*>(const_cast<void*>(numbers.data)) + first;
        for (int64_t start = 0; start < slot_stride; start += width) {
            float scale = 0;
            for (int64_t i = start; i < start + width; ++i) {
                const float size = std::fabs(from[i]);
                scale = size > scale || size != size ? size : scale;  // a NaN stays the greatest
                if (size != size) break;
            }
            scale = rounded(scale / 127.0f, dtype);
            scales[(first + start) / width] = scale;
            const float divisor = scale == 0.0f ? 1.0f : scale;
            for (int64_t i = start; i < start + width; ++i) {
                const float code = std::nearbyint(from[i] / divisor);
                codes[i] = int8_t(code > 127.0f ? 127.0f : code > -127.0f ? code : -127.0f);
            }
        }
    }
};

struct Attend {
    const float* queries;  // [rows, heads, width], scaled
    float* out;            // [rows, heads, width]
    States keys, values;
    const int64_t* sequences;                  // [rows], of the batch
    const std::vector<int32_t>* const* slots;  // [rows], the slots that each row sees
    Numbers sinks;                             // [heads], or none
    int64_t rows, heads, kv_heads, width;
    float softcap;  // or 0
    int64_t threads;

    static constexpr int64_t block = 32;  // slots whose keys and values are in float32 at a time
    static constexpr int64_t least = 64;  // slots of one part

    int64_t parts = 1, group = 1;
    int64_t heads_at_once = 1;   // key/value heads of one task
    float* partial = nullptr;  // [rows, heads, parts, width + 2]: sums, greatest score, weights

    void run() {
        group = heads / kv_heads;
        int64_t most = 0, seen = 0;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t count = slots[row]->size();
            most = std::max(most, count);
            seen += count;
        }
        // A few parts for each thread; small jobs stay on the thread that calls.
        const int64_t used = seen * heads * width < 1 << 16 ? 1 : threads;
        if (used > 1) {
            const int64_t wanted = (4 * used + rows - 1) / rows;
            parts = std::clamp<int64_t>(most / least, 1, wanted);
        }
        heads_at_once = used == 1 || rows * parts >= 2 * used ? kv_heads : 1;
        const int64_t tasks = rows * (kv_heads / heads_at_once) * parts;
        static thread_local std::vector<float> buffer;
        buffer.resize(rows * heads * parts * (width + 2));
        partial = buffer.data();
        const auto call = [](const void* self, int64_t number) {
            static_cast<const Attend*>(self)->part(number);
        };
        pool().run(call, this, tasks, int(used));
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t head = 0; head < heads; ++head) merge(row, head);
        }
    }

    float* result(int64_t row, int64_t head, int64_t part) const {
        return partial + ((row * heads + head) * parts + part) * (width + 2);
    }

    // Some key/value heads, over one part of the slots of a row.
    void part(int64_t number) const {
        const int64_t part = number % parts, tasks = kv_heads / heads_at_once;
        const int64_t head = number / parts % tasks * heads_at_once, row = number / parts / tasks;
        const std::vector<int32_t>& seen = *slots[row];
        const int64_t count = seen.size();
        const int64_t start = count * part / parts, end = count * (part + 1) / parts;
        for (int64_t h = head * group; h < (head + heads_at_once) * group; ++h) {
            float* to = result(row, h, part);
            std::fill(to, to + width + 2, 0.0f);
            to[width] = -INFINITY;
        }
        for (int64_t first = start; first < end; first += block) {
            const int64_t next = std::min(first + 2 * block, end);
            for (int64_t i = first + block; i < next; ++i) {
                const int64_t numbers = heads_at_once * width;
                keys.prefetch(sequences[row], seen[i], head * width, numbers);
                values.prefetch(sequences[row], seen[i], head * width, numbers);
            }
            const int64_t n = std::min(block, end - first);
            // Heads lie side by side: as many as the first cache has room for are read at once.
            const int64_t most = std::max<int64_t>(1, 8192 / (block * width));
            for (int64_t h = 0; h < heads_at_once; h += most)
                slots_of(row, head + h, std::min(most, heads_at_once - h), part,
                         seen.data() + first, n);
        }
    }

    // The heads that share some key/value heads, over a block of slots.
    void slots_of(int64_t row, int64_t kv_head, int64_t kv_count, int64_t part,
                  const int32_t* seen, int64_t n) const {
        static thread_local std::vector<float> buffer;
        const int64_t stride = kv_count * width, first = kv_head * group, count = kv_count * group;
        buffer.resize(block * (stride + count));
        float *wide = buffer.data(), *scores = wide + block * stride;
        const float* at[block];
        const int64_t sequence = sequences[row];
        for (int64_t i = 0; i < n; ++i)
            at[i] = keys.at(sequence, seen[i], kv_head, kv_count, width, wide + i * stride);
        std::fill(at + n, at + block, at[0]);  // `dots` reads as many keys as a vector has lanes
        for (int64_t g = 0; g < count; ++g) {
            const float* query = queries + (row * heads + first + g) * width;
            for (int64_t i = 0; i < n; i += Wide::lanes)
                dots(query, at + i, g / group * width, scores + g * block + i);
        }
        for (int64_t i = 0; i < n; ++i)
            at[i] = values.at(sequence, seen[i], kv_head, kv_count, width, wide + i * stride);
        for (int64_t g = 0; g < count; ++g)
            add(scores + g * block, at, g / group * width, n, result(row, first + g, part));
    }

    // The products of a query with one key for each lane of a vector, from a place of the keys on.
    void dots(const float* query, const float* const* keys, int64_t place, float* scores) const {
        Wide::Sums sums[Wide::lanes];
        std::fill(sums, sums + Wide::lanes, Wide::zero());
        int64_t h = 0;
        for (; h + Wide::lanes <= width; h += Wide::lanes) {
            const Wide::Vector own = Wide::load(query + h);
#pragma GCC unroll 16
            for (int i = 0; i < Wide::lanes; ++i)
                sums[i] = Wide::add(own, Wide::load(keys[i] + place + h), sums[i]);
        }
        Wide::store(scores, Wide::sums(sums));
        for (int i = 0; h < width && i < Wide::lanes; ++i)
            for (int64_t j = h; j < width; ++j) scores[i] += query[j] * keys[i][place + j];
    }

    // Add a block of values to the sums of a part: to = {sums[width], greatest score, weights}.
    void add(float* scores, const float* const* at, int64_t place, int64_t n, float* to) const {
        if (softcap > 0) {
            for (int64_t i = 0; i < n; ++i) scores[i] = softcap * tanh_of(scores[i] / softcap);
        }
        const float before = to[width];
        for (int64_t i = n; i < block; ++i) scores[i] = -INFINITY;
        const float greatest = greatest_of(scores, before);
        for (int64_t i = 0; i < block; ++i) scores[i] = exp_of(scores[i] - greatest);
        const float weights = sum_of(scores);
        const float kept = greatest == before ? 1.0f : exp_of(before - greatest);
        to[width] = greatest;
        to[width + 1] = to[width + 1] * kept + weights;
        int64_t h = 0;
        for (; h + 4 * Wide::lanes <= width; h += 4 * Wide::lanes)
            columns<4>(scores, at, n, kept, to + h, place + h);
        for (; h + Wide::lanes <= width; h += Wide::lanes)
            columns<1>(scores, at, n, kept, to + h, place + h);
        for (; h < width; ++h) {
            float sum = to[h] * kept;
            for (int64_t i = 0; i < n; ++i) sum += scores[i] * at[i][place + h];
            to[h] = sum;
        }
    }

    // Loops over a block whose turns don't depend on each other, for the compiler.
    static float greatest_of(const float* scores, float least) {
        float found[16];
        std::fill(found, found + 16, least);
        for (int64_t i = 0; i < block; i += 16)
            for (int64_t j = 0; j < 16; ++j)
                found[j] = scores[i + j] > found[j] ? scores[i + j] : found[j];
        for (float one : found) least = one > least ? one : least;
        return least;
    }
    static float sum_of(const float* weights) {
        float sums[16] = {}, sum = 0;
        for (int64_t i = 0; i < block; i += 16)
            for (int64_t j = 0; j < 16; ++j) sums[j] += weights[i + j];
        for (float one : sums) sum += one;
        return sum;
    }

    template <int C>
    static void columns(const float* weights, const float* const* at, int64_t n, float kept,
                        float* to, int64_t h) {
        Wide::Sums sums[C];
        for (int c = 0; c < C; ++c) sums[c] = Wide::load(to + c * Wide::lanes) * kept;
        for (int64_t i = 0; i < n; ++i) {
            const Wide::Vector weight = Wide::zero() + weights[i];
            for (int c = 0; c < C; ++c)
                sums[c] = Wide::add(weight, Wide::load(at[i] + h + c * Wide::lanes), sums[c]);
        }
        for (int c = 0; c < C; ++c) Wide::store(to + c * Wide::lanes, sums[c]);
    }

    void merge(int64_t row, int64_t head) const {
        float sink = -INFINITY;
        if (sinks.data) read_floats(sinks, head, &sink, 1);
        float greatest = sink, weights = 0;
        for (int64_t part = 0; part < parts; ++part)
            greatest = std::max(greatest, result(row, head, part)[width]);
        if (sinks.data) weights = exp_of(sink - greatest);
        float* to = out + (row * heads + head) * width;
        std::fill(to, to + width, 0.0f);
        for (int64_t part = 0; part < parts; ++part) {
            const float* from = result(row, head, part);
            const float factor = exp_of(from[width] - greatest);
            weights += from[width + 1] * factor;
            for (int64_t h = 0; h < width; ++h) to[h] += from[h] * factor;
        }
        const float share = 1.0f / weights;
        for (int64_t h = 0; h < width; ++h) to[h] *= share;
    }
};

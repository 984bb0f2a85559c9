// y = x W^T + b for a few rows x and a weight W, dense or in codes of 4 or 8 bits.
//
// The weight is read once for each call, and no dense weight is written to memory. All sums are
// float32.
//
// The numbers of a few outputs become vectors in registers and are multiplied at once with some
// rows (kernel.h). Codes in tiles are multiplied as bytes (tiles.h) or as floats (float_tiles.h).
// Where decoding is slow beside the products, many rows share numbers that are written to a buffer
// in the cache of the core.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "float_tiles.h"
#include "kernel.h"
#include "numbers.h"
#include "rows.h"
#include "threads.h"
#include "tiles.h"
#include "weights.h"

namespace {

constexpr int block = 12;  // outputs that are computed side by side, unless in tiles
// Products of fewer numbers stay on one thread: that is faster than to wake another one.
constexpr int64_t least_work = 1 << 17;

// How many bytes ahead to fetch numbers into the cache: those of the next tile, but not fewer than
// memory delivers while it is asked.
int64_t distance(int64_t bytes) { return std::max<int64_t>(bytes, 8192); }

// One weight of one call.
struct Job {
    const Weight* weight;
    void (*outputs)(const Job&, int64_t first);  // computes a block of outputs
    const float* x;                              // [rows, inputs]
    const void* prepared;                        // x as the source wants it
    float* y;                                    // [rows, outputs]
    int64_t rows, block, chunk_blocks, chunks;
    bool accumulate;
};

template <class V>
using Own = Dense<V, V::kind>;  // numbers as V has them

// The products of a weight that is read by the source S.
template <class S>
struct Path {
    using V = typename S::Vectors;
    using Number = typename V::Number;
    using Sums = typename V::Sums;
    // Outputs of a tile of 8 rows: as many sums and weights as fit into registers.
    template <class From>
    static constexpr int eight = From::step == 2 * V::lanes ? 2 : 3;
    static constexpr int many = most<V> == 8 ? 3 : few<V>;  // outputs of a tile of packed numbers

    const Job& job;
    const Weight& weight;
    const int64_t first, live;  // the first output, and how many are computed
    const int64_t main, group;  // inputs that are full steps
    Output outputs[block];

    Path(const Job& of, int64_t output)
        : job(of),
          weight(*of.weight),
          first(output),
          live(std::min<int64_t>(block, weight.outputs - output)),
          main(weight.inputs / S::step * S::step),
          group(S::coded ? weight.group : S::step) {}

    // Write the sums of a tile. What is not a full step is added one by one.
    template <int R, int O>
    void put(const Sums* totals, int64_t row, int64_t o) const {
        const int64_t end = std::min<int64_t>(O, live - o);
        for (int r = 0; r < R; ++r) {
            const float* x = job.x + (row + r) * weight.inputs;
            float* to = job.y + (row + r) * weight.outputs + first + o;
            for (int64_t p = 0; p < end; ++p) {
                float sum = V::sum(totals[r * O + p]);
                for (int64_t i = main; i < weight.inputs; ++i)
                    sum += value_at(weight, first + o + p, i) * x[i];
                if (weight.bias) sum += weight.bias[first + o + p];
                to[p] = job.accumulate ? to[p] + sum : sum;
            }
        }
    }

    // The tiles of R rows and all outputs of the block. The inputs of a stretch of x stay in the
    // first cache for all of them.
    template <class From, int R, int O>
    void tiles(int64_t row, int64_t ahead) const {
        Sums totals[block / O][R * O];
        if (!main) {  // fewer inputs than a step, all of which are left for `put`
            for (auto& sums : totals) std::fill(sums, sums + R * O, V::zero());
        }
        const auto* x = static_cast<const Number*>(job.prepared) + row * main;
        const int64_t many_inputs = R < 8 ? main : 1024 / int64_t(sizeof(Number));
        const int64_t stretch = std::max(group, many_inputs / group * group);
        for (int64_t begin = 0; begin < main; begin += stretch) {
            const Inputs inputs = {begin, std::min(main, begin + stretch), group};
            for (int64_t o = 0; o < live; o += O)
                tile<From, R, O>(x, outputs + o, weight.levels, inputs, ahead, totals[o / O]);
        }
        for (int64_t o = 0; o < live; o += O) put<R, O>(totals[o / O], row, o);
    }

    template <class From, int O>
    void rows(int64_t ahead) const {
        for (int64_t row = 0, count; row < job.rows; row += count) {
            count = tile_rows<V>(job.rows - row);
            switch (count) {
                case 1: tiles<From, 1, O>(row, ahead); break;
                case 2: tiles<From, 2, O>(row, ahead); break;
                case 3: tiles<From, 3, O>(row, ahead); break;
                case 4: tiles<From, 4, O>(row, ahead); break;
                default:
                    if constexpr (most<V> == 8) tiles<From, 8, eight<From>>(row, ahead);
            }
        }
    }

    // Write the numbers of all outputs as V has them.
    void pack(Number* to, int64_t ahead) {
        constexpr int parts = S::step / V::lanes;
        typename V::Vector numbers[parts];
        for (int64_t o = 0; o < live; ++o) {
            const Output& from = outputs[o];
            Number* at = to + o / many * many * main + o % many * V::lanes;
            for (int64_t begin = 0, g = 0; begin < main; begin += group, ++g) {
                typename S::Group of;
                if (S::coded) of = {weight.levels, from.scales[g], from.offsets[g]};
                for (int64_t i = begin; i < begin + group; i += S::step) {
                    const uint8_t* place = S::at(from.row, i);
                    __builtin_prefetch(place + ahead, 0, 2);
                    S::read_step(place, of, numbers);
                    for (int part = 0; part < parts; ++part)
                        V::store(at + (i + part * V::lanes) * many, numbers[part]);
                }
            }
        }
        for (int64_t o = 0; o < block; ++o) {
            Number* at = to + o / many * many * main + o % many * V::lanes;
            outputs[o].row = reinterpret_cast<const uint8_t*>(at);
        }
    }

    void run() {
        static thread_local std::vector<float> factors;
        static thread_local std::vector<Number> buffer;
        const int64_t groups = S::coded ? weight.inputs / weight.group : 0;
        const int64_t bytes = row_bytes(weight);
        factors.resize(2 * block * groups);
        for (int64_t o = 0; o < block; ++o) {
            const int64_t output = std::min(o, live - 1);  // what is beyond the last is its copy
            float* scales = factors.data() + 2 * output * groups;
            outputs[o] = {static_cast<const uint8_t*>(weight.codes) + (first + output) * bytes,
                          scales, scales + groups};
            if (S::coded && o < live) {
                widen_factors(weight, first + o, scales, scales + groups);
            }
        }
        if (job.rows <= 8 || !S::coded || V::lanes == 16) {
            return rows<S, few<V>>(distance((job.rows < most<V> ? few<V> : block) * bytes));
        }
        buffer.resize(block * main);
        pack(buffer.data(), block * bytes);
        rows<Packed<V, many>, many>(0);
    }

    static void outputs_from(const Job& job, int64_t output) { Path(job, output).run(); }
};

// The products of one or two rows with a dense weight: one output after the other, so that memory
// is read in one stream. Several outputs at once reach three quarters of this bandwidth.
template <class S, int R>
struct StreamPath {
    using V = typename S::Vectors;
    static constexpr int sums = 4, step = sums * V::lanes;  // as many sums as hide the latency

    static void outputs_from(const Job& job, int64_t first) {
        const Weight& weight = *job.weight;
        const int64_t inputs = weight.inputs, bytes = row_bytes(weight);
        const int64_t main = inputs / V::lanes * V::lanes, unrolled = inputs / step * step;
        const auto* x = static_cast<const typename V::Number*>(job.prepared);
        const int64_t end = std::min(weight.outputs, first + block);
        for (int64_t output = first; output < end; ++output) {
            const auto* row = static_cast<const uint8_t*>(weight.codes) + output * bytes;
            typename V::Sums totals[R][sums];
            for (auto& own : totals) std::fill(own, own + sums, V::zero());
            int64_t i = 0;
            for (; i < unrolled; i += step) {
                __builtin_prefetch(S::at(row, i) + 4096, 0, 2);
                __builtin_prefetch(S::at(row, i) + 4160, 0, 2);
#pragma GCC unroll 4
                for (int part = 0; part < sums; ++part)
                    add<R>(row, x, i + part * V::lanes, totals, part);
            }
            for (int part = 0; i < main; i += V::lanes, ++part) add<R>(row, x, i, totals, part);
            for (int r = 0; r < R; ++r) {
                float sum = V::sum(plus(plus(totals[r][0], totals[r][1]),
                                        plus(totals[r][2], totals[r][3])));
                for (int64_t j = main; j < inputs; ++j)
                    sum += value_at(weight, output, j) * job.x[r * inputs + j];
                if (weight.bias) sum += weight.bias[output];
                float& y = job.y[r * weight.outputs + output];
                y = job.accumulate ? y + sum : sum;
            }
        }
    }

    template <int rows>
    static void add(const uint8_t* row, const typename V::Number* x, int64_t i,
                    typename V::Sums (*totals)[sums], int part) {
        typename V::Vector numbers[1];
        S::read_step(S::at(row, i), {}, numbers);
#pragma GCC unroll 2
        for (int r = 0; r < rows; ++r)
            totals[r][part] =
                V::add(numbers[0], V::load(x + i * rows + r * V::lanes), totals[r][part]);
    }

    static typename V::Sums plus(typename V::Sums a, typename V::Sums b) { return a + b; }
};

#ifdef TRANSOM_TILES

// The products of a weight in tiles.
template <class Tiles>
struct TilePath {
    static void outputs_from(const Job& job, int64_t first) {
        static thread_local std::vector<float> factors;
        const Weight& weight = *job.weight;
        const int64_t numbers = weight.inputs / weight.group * kTile;
        factors.resize(2 * numbers);
        float *scales = factors.data(), *offsets = scales + numbers;
        write_factors(weight, first / kTile, scales, offsets);
        const auto* codes = static_cast<const uint8_t*>(weight.codes) + first * row_bytes(weight);
        for (int64_t row = 0, count; row < job.rows; row += count) {
            count = rows_at_once(job.rows - row);
            switch (count) {
                case 1: some<1>(job, codes, scales, offsets, first, row); break;
                case 2: some<2>(job, codes, scales, offsets, first, row); break;
                case 4: some<4>(job, codes, scales, offsets, first, row); break;
                default: some<8>(job, codes, scales, offsets, first, row);
            }
        }
    }

    template <int R>
    static void some(const Job& job, const uint8_t* codes, const float* scales,
                     const float* offsets, int64_t first, int64_t row) {
        const Weight& weight = *job.weight;
        const auto& x = *static_cast<const typename Tiles::Rows*>(job.prepared);
        __m512 sums[R];
        Tiles::template products<R>(codes, scales, offsets, weight, x, row, sums);
        for (int r = 0; r < R; ++r) {
            float* y = job.y + (row + r) * weight.outputs + first;
            if (weight.bias) sums[r] = _mm512_add_ps(sums[r], _mm512_loadu_ps(weight.bias + first));
            if (job.accumulate) sums[r] = _mm512_add_ps(sums[r], _mm512_loadu_ps(y));
            _mm512_storeu_ps(y, sums[r]);
        }
    }
};

#endif

// Groups that are no number of steps: numbers are read one by one.
void outputs_one_by_one(const Job& job, int64_t first) {
    static thread_local std::vector<float> buffer;
    const Weight& weight = *job.weight;
    const int64_t groups = weight.inputs / weight.group;
    buffer.resize(weight.inputs + 2 * groups);
    float *row = buffer.data(), *scales = row + weight.inputs, *offsets = scales + groups;
    const int64_t end = std::min(weight.outputs, first + block);
    for (int64_t output = first; output < end; ++output) {
        widen_factors(weight, output, scales, offsets);
        for (int64_t i = 0; i < weight.inputs; ++i) {
            const int64_t g = i / weight.group;
            row[i] = value_at(weight, output, i) * scales[g] + offsets[g];
        }
        for (int64_t r = 0; r < job.rows; ++r) {
            const float* x = job.x + r * weight.inputs;
            auto total = Narrow::zero();
            int64_t i = 0;
            for (; i + Narrow::lanes <= weight.inputs; i += Narrow::lanes)
                total = Narrow::add(Narrow::load(row + i), Narrow::load(x + i), total);
            float sum = Narrow::sum(total);
            for (; i < weight.inputs; ++i) sum += row[i] * x[i];
            if (weight.bias) sum += weight.bias[output];
            float& y = job.y[r * weight.outputs + output];
            y = job.accumulate ? y + sum : sum;
        }
    }
}

template <class S, bool pairs = false>
void take(Job& job, Rows& rows) {
    job.outputs = Path<S>::outputs_from;
    if constexpr (!S::coded && S::Vectors::lanes < 32) {
        if (job.rows == 1) job.outputs = StreamPath<S, 1>::outputs_from;
        // Longer rows of x don't stay in the first cache.
        const bool two = job.rows == 2 && rows.inputs <= 4096;
        if (two) job.outputs = StreamPath<S, 2>::outputs_from;
    }
    job.prepared = rows.packed<typename S::Vectors, pairs>();
}

#ifdef TRANSOM_TILES
template <class Tiles>
void take_tiles(Job& job, Rows& rows) {
    static thread_local typename Tiles::Rows prepared;
    if (!(rows.made & Tiles::bit)) prepared.make(rows.x, rows.count, rows.inputs, rows.threads);
    rows.made |= Tiles::bit;
    job.outputs = TilePath<Tiles>::outputs_from;
    job.prepared = &prepared;
    job.block = kTile;
}

template <bool four, int planes>
void choose_span(Job& job, Rows& rows) {
    job.weight->group == 16 ? take_tiles<ByteTiles<four, planes, 16>>(job, rows)
                            : take_tiles<ByteTiles<four, planes, 32>>(job, rows);
}

void choose_tiles(Job& job, Rows& rows) {
    const bool two = job.weight->rounded && rows.fits_brain();
    const float* levels = job.weight->levels;
    if (job.weight->storage == kFloat8) {
        take_tiles<FloatTiles<Floats>>(job, rows);
    } else if (levels && !in_a_row(levels)) {
#ifdef TRANSOM_BRAIN
        if (two && job.rows >= 4) return take_tiles<FloatTiles<Table<true>>>(job, rows);
#endif
        take_tiles<FloatTiles<Table<false>>>(job, rows);
    } else if (levels) {
        two ? choose_span<true, 2>(job, rows) : choose_span<true, 3>(job, rows);
    } else {
        two ? choose_span<false, 2>(job, rows) : choose_span<false, 3>(job, rows);
    }
}
#endif

template <class V>
void choose_codes(Job& job, Rows& rows) {
    constexpr bool pairs = V::lanes < 32;
    if (job.weight->storage == kFloat8) return take<Bytes<V, kFloat8>>(job, rows);
    if (!job.weight->levels) return take<Bytes<V, kInt8>>(job, rows);
    if (in_a_row(job.weight->levels)) {
        take<Nibbles<V, typename V::Integers>, pairs>(job, rows);
    } else {
        take<Nibbles<V, typename V::Levels>, pairs>(job, rows);
    }
}

// Choose the path of a weight, and prepare x for it.
void choose(Job& job, Rows& rows) {
    const Weight& weight = *job.weight;
#ifdef TRANSOM_TILES
    if (weight.tiled) return choose_tiles(job, rows);
#endif
#ifdef TRANSOM_BRAIN
    const bool fits = weight.scales ? weight.group % Brain::lanes == 0 && weight.rounded
                                    : weight.storage == kBFloat16;
    if (fits && job.rows >= 4 && rows.fits_brain()) {
        return weight.scales ? choose_codes<Brain>(job, rows) : take<Own<Brain>>(job, rows);
    }
#endif
    const int64_t pair = weight.levels ? 2 : 1;
    if (weight.storage == kFloat32) {
        take<Own<Wide>>(job, rows);
    } else if (weight.storage == kFloat16) {
        take<Dense<Wide, kFloat16>>(job, rows);
    } else if (weight.storage == kBFloat16) {
        take<Dense<Wide, kBFloat16>>(job, rows);
    } else if (weight.group % (pair * Wide::lanes) == 0) {
        choose_codes<Wide>(job, rows);
    } else if (weight.group % (pair * Narrow::lanes) == 0) {
        choose_codes<Narrow>(job, rows);
    } else {
        job.outputs = outputs_one_by_one;
    }
}

struct Call {
    const Job* jobs;

    static void chunk(const void* self, int64_t number) {
        const Job* job = static_cast<const Call*>(self)->jobs;
        for (; number >= job->chunks; ++job) number -= job->chunks;
        const int64_t size = job->chunk_blocks * job->block, begin = number * size;
        const int64_t end = std::min(job->weight->outputs, begin + size);
        for (int64_t output = begin; output < end; output += job->block) job->outputs(*job, output);
    }
};

// Whether the columns of two weights are in the same order.
bool same_order(const Weight& a, const Weight& b) {
    if (!a.order || !b.order) return a.order == b.order;
    return a.order == b.order || !std::memcmp(a.order, b.order, a.inputs * sizeof(int32_t));
}

// x in the order of the columns of a weight.
const float* in_order(const float* x, int64_t rows, const Weight& weight, int threads) {
    if (!weight.order) return x;
    static thread_local std::vector<float> ordered;
    ordered.resize(rows * weight.inputs);
    float* to = ordered.data();
    const auto gather = [&](int64_t row) {
        const float* from = x + row * weight.inputs;
        float* own = to + row * weight.inputs;
        for (int64_t i = 0; i < weight.inputs; ++i) own[i] = from[weight.order[i]];
    };
    in_pool(gather, rows, rows < 4 ? 1 : threads);
    return to;
}

// `multiply` for weights whose columns are in the order of x.
void multiply_in_order(const float* x, int64_t rows, const Weight* const* weights, int count,
                       float* const* y, int threads, bool accumulate) {
    static thread_local std::vector<Job> jobs;
    int64_t work = 0, chunks = 0;
    jobs.resize(count);
    for (int i = 0; i < count; ++i) work += rows * weights[i]->outputs * weights[i]->inputs;
    if (work < least_work) threads = 1;
    Rows prepared{x, rows, weights[0]->inputs, threads};
    for (int i = 0; i < count; ++i) {
        const Weight& weight = *weights[i];
        Job& job = jobs[i];
        job = {&weight, nullptr, x, nullptr, y[i], rows, block, 1, 0, accumulate};
        choose(job, prepared);
        const int64_t blocks = (weight.outputs + job.block - 1) / job.block;
        const int64_t block_work = rows * job.block * weight.inputs;
        job.chunk_blocks = std::max<int64_t>(1, work / (8 * threads) / block_work);
        job.chunks = (blocks + job.chunk_blocks - 1) / job.chunk_blocks;
        chunks += job.chunks;
    }
    const Call call{jobs.data()};
    pool().run(Call::chunk, &call, chunks, threads);
}

}  // namespace

void multiply(const float* x, int64_t rows, const Weight* const* weights, int count,
              float* const* y, int threads, bool accumulate) {
    for (int begin = 0, end; begin < count; begin = end) {
        const Weight& first = *weights[begin];
        for (end = begin + 1; end < count && same_order(first, *weights[end]);) ++end;
        const float* ordered = in_order(x, rows, first, threads);
        multiply_in_order(ordered, rows, weights + begin, end - begin, y + begin, threads,
                          accumulate);
    }
}

extern "C" {

// `multiply` for Python. Return 0, or 1 if there was no memory for x.
int transom_product(const float* x, int64_t rows, const Weight* const* weights, int count,
                    float* const* y, int threads, int accumulate) {
    try {
        multiply(x, rows, weights, count, y, threads, accumulate);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// Whether this processor multiplies tiles.
int transom_has_tiles() {
#ifdef TRANSOM_TILES
    return 1;
#else
    return 0;
#endif
}

// Bring rows of codes into tiles, in place. The rows are a multiple of 16.
void transom_to_tiles(uint8_t* codes, int64_t rows, int64_t row_bytes, int four, int threads) {
    const auto work = [&](int64_t tile) {
        to_tile(codes + tile * kTile * row_bytes, row_bytes, four);
    };
    in_pool(work, rows / kTile, threads);
}

// Write the numbers of some rows of a weight in tiles, one after the other.
void transom_rows(const Weight* weight, const int64_t* rows, int64_t count, float* to,
                  int threads) {
#ifdef TRANSOM_TILES
    constexpr int64_t together = 16;
    const auto chunk = [&](int64_t number) {
        const int64_t end = std::min(count, (number + 1) * together);
        for (int64_t i = number * together; i < end; ++i) {
            float* own = to + i * weight->inputs;
            const bool floats = weight->storage == kFloat8;
            floats           ? write_row_of_floats(*weight, rows[i], own)
            : weight->levels ? write_row<true>(*weight, rows[i], own)
                             : write_row<false>(*weight, rows[i], own);
        }
    };
    in_pool(chunk, (count + together - 1) / together, threads);
#endif
}
}

// y = x W^T + b for a few rows x and a weight W in codes of 4 or 8 bits.
//
// The parts of the weight are those of transom/quantize/formats.py. The codes are read once for
// each call, and no dense weight is written to memory. All sums are float32.
//
// One to three rows: the codes of some outputs become float32 in registers and are multiplied at
// once. More rows: the weights of a few outputs are written to a buffer that stays in the cache of
// the core, and every row of x is multiplied with it.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"
#include "threads.h"
#include "weights.h"

namespace {

// One weight of one call.
struct Job : Weight {
    const float* x;  // [rows, inputs]
    float* y;        // [rows, outputs]
    int64_t rows, threads;
    bool accumulate;
};

}  // namespace

namespace {

constexpr int out_block = 4;  // outputs that are computed side by side

float float8_to_float(uint8_t code) {  // e4m3fn: no infinity, a bias of 7
    const int exponent = code >> 3 & 15, fraction = code & 7;
    if ((code & 127) == 127) return __builtin_nanf("");
    const float value = exponent ? float(8 + fraction) * float(1 << exponent) / 1024.0f
                                 : float(fraction) / 512.0f;
    return code & 128 ? -value : value;
}

float number_at(const void* from, int64_t kind, int64_t i) {
    switch (kind) {
        case kFloat32: return static_cast<const float*>(from)[i];
        case kFloat16: return half_to_float(static_cast<const uint16_t*>(from)[i]);
        case kInt8: return float(static_cast<const int8_t*>(from)[i]);
        case kFloat8: return float8_to_float(static_cast<const uint8_t*>(from)[i]);
        default: break;
    }
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Write the scales or minimums of one output in float32.
void widen(const Job& job, const void* from, const void* super, bool centered, int64_t output,
           float* to) {
    const int64_t groups = job.inputs / job.group, first = output * groups;
    if (job.scale_kind == kFloat16 && !job.block) {
        halves_to_floats(static_cast<const uint16_t*>(from) + first, to, groups);
        return;
    }
    for (int64_t g = 0; g < groups; ++g) to[g] = number_at(from, job.scale_kind, first + g);
    if (!job.block) return;
    const float mean = centered ? number_at(job.scale_mean, job.super_kind, 0) : 0.0f;
    for (int64_t g = 0; g < groups;) {
        const int64_t place = (first + g) / job.block;
        const float factor = number_at(super, job.super_kind, place);
        const int64_t end = std::min(groups, (place + 1) * job.block - first);
        for (; g < end; ++g) to[g] = to[g] * factor + mean;
    }
}

// The products of one call. V is a vector of simd.h, `four` tells codes of 4 from those of 8 bits.
//
// With codes of 4 bits, a step takes V::lanes bytes: the codes with even places from the high
// halves, then those with odd places. x is brought into this order once. A step never crosses the
// end of a group. What is left at its end is done one by one.
template <class V, bool four>
struct Product {
    using Floats = typename V::Floats;
    static constexpr int step = four ? 2 * V::lanes : V::lanes;

    const Job& job;
    const int64_t groups, in_steps;
    const bool offsets;
    std::vector<float> ordered, sums;  // x in the order of steps; its sum over each group
    const float* x;
    typename V::Table table;
    int64_t chunk_blocks = 1;

    static const float* levels_of(const Job& job) {
        static const float none[16] = {};
        return job.levels ? job.levels : none;
    }

    explicit Product(const Job& given)
        : job(given),
          groups(given.inputs / given.group),
          in_steps(given.group / step * step),
          offsets(given.zeros || given.minimums),
          x(given.x),
          table(levels_of(given)) {
        if (four) put_in_order();
        if (offsets) sum_groups();
    }

    void put_in_order() {
        ordered.resize(job.rows * job.inputs);
        for (int64_t g = 0; g < job.rows * groups; ++g) {
            const float* from = job.x + g * job.group;
            float* to = ordered.data() + g * job.group;
            for (int64_t i = 0; i < in_steps; i += step) {
                for (int lane = 0; lane < V::lanes; ++lane) {
                    to[i + lane] = from[i + 2 * lane];
                    to[i + V::lanes + lane] = from[i + 2 * lane + 1];
                }
            }
            std::copy(from + in_steps, from + job.group, to + in_steps);
        }
        x = ordered.data();
    }

    void sum_groups() {
        sums.resize(job.rows * groups);
        for (int64_t g = 0; g < job.rows * groups; ++g) {
            const float* from = x + g * job.group;
            Floats total = V::zero();
            for (int64_t i = 0; i < in_steps; i += V::lanes) {
                total = V::add(total, V::load(from + i));
            }
            float sum = V::sum(total);
            for (int64_t i = in_steps; i < job.group; ++i) sum += from[i];
            sums[g] = sum;
        }
    }

    // The place of the first code of an output, and the value of one code after it.
    const uint8_t* codes_of(int64_t output) const {
        const int64_t width = four ? job.inputs / 2 : job.inputs;
        return static_cast<const uint8_t*>(job.codes) + output * width;
    }
    float value(const uint8_t* codes, int64_t i) const {
        if (!four) return float(static_cast<int8_t>(codes[i]));
        return job.levels[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
    }

    // Write what multiplies and what is added in every group of an output.
    void factors(int64_t output, float* scale, float* minimum) const {
        widen(job, job.scales, job.super_scales, job.scale_mean != nullptr, output, scale);
        if (job.minimums) {
            widen(job, job.minimums, job.super_minimums, false, output, minimum);
        } else if (job.zeros) {
            const int8_t* zeros = job.zeros + output * groups;
            for (int64_t g = 0; g < groups; ++g) minimum[g] = -scale[g] * float(zeros[g]);
        }
    }

    static float dot(const float* a, const float* b, int64_t n) {
        Floats total = V::zero();
        int64_t i = 0;
        for (; i + V::lanes <= n; i += V::lanes) {
            total = V::fma(V::load(a + i), V::load(b + i), total);
        }
        float sum = V::sum(total);
        for (; i < n; ++i) sum += a[i] * b[i];
        return sum;
    }

    void write(int64_t row, int64_t output, float sum) const {
        float& y = job.y[row * job.outputs + output];
        if (job.bias) sum += job.bias[output];
        y = job.accumulate ? y + sum : sum;
    }

    // R rows by O outputs, straight from the codes.
    template <int R, int O>
    void direct(int64_t output, float* scale, float* minimum) const {
        const uint8_t* codes[O];
        Floats total[O][R];
        float rest[O][R];
        for (int o = 0; o < O; ++o) {
            codes[o] = codes_of(output + o);
            factors(output + o, scale + o * groups, minimum + o * groups);
            for (int r = 0; r < R; ++r) total[o][r] = V::zero(), rest[o][r] = 0;
        }
        for (int64_t g = 0; g < groups; ++g) {
            Floats part[O][R];
            for (int o = 0; o < O; ++o)
                for (int r = 0; r < R; ++r) part[o][r] = V::zero();
            const int64_t first = g * job.group;
            for (int64_t i = first; i < first + in_steps; i += step) {
                for (int o = 0; o < O; ++o) {
                    if (four) {
                        Floats high, low;
                        V::pairs(codes[o] + i / 2, table, high, low);
                        for (int r = 0; r < R; ++r) {
                            const float* at = x + r * job.inputs + i;
                            part[o][r] = V::fma(high, V::load(at), part[o][r]);
                            part[o][r] = V::fma(low, V::load(at + V::lanes), part[o][r]);
                        }
                    } else {
                        const auto* from = reinterpret_cast<const int8_t*>(codes[o]) + i;
                        const Floats values = V::bytes(from);
                        for (int r = 0; r < R; ++r) {
                            const float* at = x + r * job.inputs + i;
                            part[o][r] = V::fma(values, V::load(at), part[o][r]);
                        }
                    }
                }
            }
            for (int o = 0; o < O; ++o) {
                const Floats factor = V::all(scale[o * groups + g]);
                for (int r = 0; r < R; ++r) total[o][r] = V::fma(part[o][r], factor, total[o][r]);
            }
            for (int64_t i = first + in_steps; i < first + job.group; ++i)
                for (int o = 0; o < O; ++o)
                    for (int r = 0; r < R; ++r)
                        rest[o][r] +=
                            scale[o * groups + g] * value(codes[o], i) * x[r * job.inputs + i];
        }
        for (int o = 0; o < O; ++o)
            for (int r = 0; r < R; ++r) {
                float sum = V::sum(total[o][r]) + rest[o][r];
                if (offsets) sum += dot(minimum + o * groups, sums.data() + r * groups, groups);
                write(r, output + o, sum);
            }
    }

    // The weights of one output in float32, in the order of x.
    void dequantize(int64_t output, float* to, float* scale, float* minimum) const {
        const uint8_t* codes = codes_of(output);
        factors(output, scale, minimum);
        for (int64_t g = 0; g < groups; ++g) {
            const Floats factor = V::all(scale[g]), offset = V::all(offsets ? minimum[g] : 0.0f);
            const int64_t first = g * job.group;
            for (int64_t i = first; i < first + in_steps; i += step) {
                if (four) {
                    Floats high, low;
                    V::pairs(codes + i / 2, table, high, low);
                    V::store(to + i, V::fma(high, factor, offset));
                    V::store(to + i + V::lanes, V::fma(low, factor, offset));
                } else {
                    const Floats values = V::bytes(reinterpret_cast<const int8_t*>(codes) + i);
                    V::store(to + i, V::fma(values, factor, offset));
                }
            }
            for (int64_t i = first + in_steps; i < first + job.group; ++i)
                to[i] = value(codes, i) * scale[g] + (offsets ? minimum[g] : 0.0f);
        }
    }

    // R rows by O outputs, whose weights are in `weight` [O, inputs].
    template <int R, int O>
    void tile(int64_t row, int64_t output, const float* weight) const {
        Floats total[O][R];
        for (int o = 0; o < O; ++o)
            for (int r = 0; r < R; ++r) total[o][r] = V::zero();
        const float* at = x + row * job.inputs;
        int64_t i = 0;
        for (; i + V::lanes <= job.inputs; i += V::lanes) {
            Floats of_x[R];
            for (int r = 0; r < R; ++r) of_x[r] = V::load(at + r * job.inputs + i);
            for (int o = 0; o < O; ++o) {
                const Floats values = V::load(weight + o * job.inputs + i);
                for (int r = 0; r < R; ++r) total[o][r] = V::fma(values, of_x[r], total[o][r]);
            }
        }
        for (int o = 0; o < O; ++o)
            for (int r = 0; r < R; ++r) {
                float sum = V::sum(total[o][r]);
                for (int64_t j = i; j < job.inputs; ++j)
                    sum += weight[o * job.inputs + j] * at[r * job.inputs + j];
                write(row + r, output + o, sum);
            }
    }

    template <int O>
    void outputs(int64_t output, std::vector<float>& buffer) const {
        buffer.resize(O * (job.inputs + 2 * groups));
        float *scale = buffer.data(), *minimum = scale + O * groups, *weight = minimum + O * groups;
        switch (job.rows) {
            case 1: return direct<1, O>(output, scale, minimum);
            case 2: return direct<2, O>(output, scale, minimum);
            case 3: return direct<3, O>(output, scale, minimum);
        }
        for (int o = 0; o < O; ++o) dequantize(output + o, weight + o * job.inputs, scale, minimum);
        int64_t row = 0;
        constexpr int most = V::lanes == 16 ? 4 : 3;  // as many sums as fit into registers
        for (; row + most <= job.rows; row += most) tile<most, O>(row, output, weight);
        for (; row + 2 <= job.rows; row += 2) tile<2, O>(row, output, weight);
        if (row < job.rows) tile<1, O>(row, output, weight);
    }

    void chunk(int64_t number) const {
        static thread_local std::vector<float> buffer;
        const int64_t end = std::min(job.outputs, (number + 1) * chunk_blocks * out_block);
        int64_t output = number * chunk_blocks * out_block;
        for (; output + out_block <= end; output += out_block) outputs<out_block>(output, buffer);
        for (; output < end; ++output) outputs<1>(output, buffer);
    }

    void run() {
        // A thread that has lost its core costs milliseconds: smaller products stay on one.
        const int64_t blocks = (job.outputs + out_block - 1) / out_block;
        const int64_t work = job.rows * job.outputs * job.inputs;
        const int threads = work < 1 << 20 ? 1 : int(job.threads);
        chunk_blocks = std::max<int64_t>(1, blocks / (8 * threads));
        const auto call = [](const void* self, int64_t number) {
            static_cast<const Product*>(self)->chunk(number);
        };
        pool().run(call, this, (blocks + chunk_blocks - 1) / chunk_blocks, threads);
    }
};

// y = x W^T + b with a dense W.
struct DenseProduct {
    const Job& job;

    void output(int64_t output) const {
        static thread_local std::vector<float> row;
        row.resize(job.inputs);
        const int64_t first = output * job.inputs;
        for (int64_t i = 0; i < job.inputs; ++i) {
            row[i] = number_at(job.codes, job.storage, first + i);
        }
        for (int64_t r = 0; r < job.rows; ++r) {
            float sum = Product<Wide, false>::dot(row.data(), job.x + r * job.inputs, job.inputs);
            if (job.bias) sum += job.bias[output];
            float& y = job.y[r * job.outputs + output];
            y = job.accumulate ? y + sum : sum;
        }
    }

    void run() {
        const auto call = [](const void* self, int64_t number) {
            static_cast<const DenseProduct*>(self)->output(number);
        };
        pool().run(call, this, job.outputs, int(job.threads));
    }
};

template <class V>
void multiply_codes(const Job& job) {
    if (job.levels) {
        Product<V, true>(job).run();
    } else {
        Product<V, false>(job).run();
    }
}

}  // namespace

void multiply(const float* x, int64_t rows, const Weight* const* weights, int count,
              float* const* y, int threads, bool accumulate) {
    for (int i = 0; i < count; ++i) {
        const Job job{*weights[i], x, y[i], rows, threads, accumulate};
        if (!job.scales) {
            DenseProduct{job}.run();
        } else if (job.group % (job.levels ? 2 * Wide::lanes : Wide::lanes) == 0) {
            multiply_codes<Wide>(job);
        } else {
            multiply_codes<Narrow>(job);
        }
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
}

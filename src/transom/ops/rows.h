// The rows of x of one call, in the orders that the paths of different weights want.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "simd.h"

// Rows of the largest tile, and outputs of a tile of fewer rows.
template <class V>
constexpr int most = V::lanes >= 16 ? 8 : 4;
template <class V>
constexpr int few = V::lanes >= 16 ? 4 : 2;

// The number of rows of the next tile, with `left` rows left.
template <class V>
int64_t tile_rows(int64_t left) {
    return left >= most<V> ? most<V> : std::min<int64_t>(left, 4);
}

// Each order is made when a weight first asks for it, and lasts until the next call of the thread.
struct Rows {
    const float* x;
    const int64_t count, inputs;
    const int threads;
    int made = 0;  // bits: which orders exist
    int is_brain = -1;  // unknown

    // The vectors of the rows of each tile in turn. In `pairs` of vectors, the first has the
    // numbers with even places.
    template <class V, bool pairs>
    const typename V::Number* packed() {
        static thread_local std::vector<typename V::Number> to;
        constexpr int bit = pairs ? V::lanes << 3 : V::lanes;
        constexpr int step = pairs ? 2 * V::lanes : V::lanes;
        if (!pairs && count == 1 && std::is_same_v<typename V::Number, float>) {
            return reinterpret_cast<const typename V::Number*>(x);
        }
        if (made & bit) return to.data();
        made |= bit;
        const int64_t main = inputs / step * step;
        to.resize(count * main);
        auto* at = to.data();
        for (int64_t row = 0, rows; row < count; row += rows) {
            rows = tile_rows<V>(count - row);
            for (int64_t i = 0; i < main; i += step, at += rows * step)
                for (int64_t r = 0; r < rows; ++r) {
                    const float* from = x + (row + r) * inputs + i;
                    if constexpr (pairs) {
                        typename V::Vector even, odd;
                        V::split(from, even, odd);
                        V::store(at + r * V::lanes, even);
                        V::store(at + (rows + r) * V::lanes, odd);
                    } else {
                        V::store(at + r * V::lanes, V::load(from));
                    }
                }
        }
        return to.data();
    }

    // Whether bfloat16 has every number of x.
    bool fits_brain() {
        if (is_brain < 0) {
            uint32_t rest = 0;
            for (int64_t i = 0; i < count * inputs; ++i) {
                uint32_t bits;
                std::memcpy(&bits, x + i, sizeof bits);
                rest |= bits;
            }
            is_brain = (rest & 0xffff) == 0;
        }
        return is_brain;
    }
};

// The two walks over a stream that all sparse products are made of. Both take kPositions places in a panel at
// a time, `step` elements apart: a linear layer has one, a convolution the neighbours along its output's
// width.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sparse/lanes_cpu.h"
#include "sparse/stream.h"

namespace blokern {

// tile [end - begin][kPositions][lanes] ← bias + the sums of rows [begin, end), lanes = kVectors vectors. The
// panel holds, at column[i] · lanes, what the stream's i-th entry multiplies. Chains of sums of their own
// hide a multiply-add's latency where there are few.
template <class A, class T, int kVectors, int kPositions>
void multiply(const Stream& stream, const A* values, const A* panel, int64_t step, const T* bias, A* tile,
              int64_t begin, int64_t end) {
  constexpr int n = Vector<A>::size, lanes = kVectors * n;
  constexpr int kChains = std::max(1, 4 / (kVectors * kPositions));
  for (int64_t b = 0; b < stream.blocks(); ++b) {
    const int32_t* const start = stream.start + b * stream.rows;
    for (int64_t r = begin; r < end; ++r) {
      A* const sums = tile + (r - begin) * kPositions * lanes;
      VectorOf<A> sum[kChains][kPositions][kVectors] = {};
      for (int p = 0; p < kPositions; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          if (b > 0) sum[0][p][v] = load_vector(sums + p * lanes + v * n);
          if (b == 0 && bias != nullptr) sum[0][p][v] = broadcast(static_cast<A>(bias[r]));
        }
      }
      int32_t i = start[r];
      const auto add = [&](int chain) {
        const VectorOf<A> weight = broadcast(values[i]);
        const A* const x = panel + static_cast<int64_t>(stream.column[i]) * lanes;
        for (int p = 0; p < kPositions; ++p) {
          for (int v = 0; v < kVectors; ++v)
            sum[chain][p][v] = multiply_add(weight, load_vector(x + p * step + v * n), sum[chain][p][v]);
        }
        ++i;
      };
      if constexpr (kChains > 1) {
        for (const int32_t last = start[r + 1] - kChains; i <= last;) {
          for (int chain = 0; chain < kChains; ++chain) add(chain);
        }
      }
      while (i < start[r + 1]) add(0);
      for (int p = 0; p < kPositions; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          for (int chain = 1; chain < kChains; ++chain) sum[0][p][v] += sum[chain][p][v];
          store_vector(sums + p * lanes + v * n, sum[0][p][v]);
        }
      }
    }
  }
}

// values ← or, with `add`, + ⟨a, b⟩ over one panel, for the entries of rows [begin, end): sums over lanes and
// over `places` places, `a_step` and `b_step` elements apart. a [rows][a_row] has row r's factor at r ·
// a_row.
template <class A, int kVectors>
void inner_products(const Stream& stream, const A* a_panel, int64_t a_row, int64_t a_step, const A* b_panel,
                    int64_t b_step, int64_t places, A* values, bool add, int64_t begin, int64_t end) {
  constexpr int n = Vector<A>::size, lanes = kVectors * n;
  for (int64_t b = 0; b < stream.blocks(); ++b) {
    const int32_t* const start = stream.start + b * stream.rows;
    for (int64_t r = begin; r < end; ++r) {
      for (int32_t i = start[r]; i < start[r + 1]; i += n) {
        // As many entries as a vector has elements at a time; where a row has fewer left, its last one again.
        const int count = std::min<int32_t>(n, start[r + 1] - i);
        VectorOf<A> products[n] = {};
        for (int64_t p = 0; p < places; ++p) {
          VectorOf<A> factor[kVectors];
          for (int v = 0; v < kVectors; ++v)
            factor[v] = load_vector(a_panel + r * a_row + p * a_step + v * n);
#pragma GCC unroll 16
          for (int k = 0; k < n; ++k) {
            const A* const x = b_panel +
                               static_cast<int64_t>(stream.column[i + std::min(k, count - 1)]) * lanes +
                               p * b_step;
            for (int v = 0; v < kVectors; ++v)
              products[k] = multiply_add(factor[v], load_vector(x + v * n), products[k]);
          }
        }
        const VectorOf<A> sums = sums_of<A>(products);
        if (count == n) {
          store_vector(values + i, add ? sums + load_vector(values + i) : sums);
        } else {
          for (int k = 0; k < count; ++k) values[i + k] = sums[k] + (add ? values[i + k] : A(0));
        }
      }
    }
  }
}

}  // namespace blokern

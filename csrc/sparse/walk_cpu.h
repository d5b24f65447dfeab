// The two walks over a stream that all sparse products are made of. A linear layer has one place in its
// panel, a convolution all positions of a tile's output.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sparse/lanes_cpu.h"
#include "sparse/stream.h"

namespace blokern {

// to [end - begin][kPositions][lanes], its rows `to_row` elements apart, ← bias + the sums of rows [begin,
// end), lanes = kVectors vectors. The panel holds, at column[i] · kPitch, what the stream's i-th entry
// multiplies at the first position; the next are `step` elements on. Chains of sums of their own hide a
// multiply-add's latency where there are few.
template <class A, class T, int kVectors, int kPositions, int kPitch = kVectors * Vector<A>::size>
void multiply(const Stream& stream, const A* values, const A* panel, int64_t step, const T* bias, A* to,
              int64_t to_row, int64_t begin, int64_t end) {
  constexpr int n = Vector<A>::size, lanes = kVectors * n;
  constexpr int kChains = std::max(1, 4 / (kVectors * kPositions));
  for (int64_t b = 0; b < stream.blocks(); ++b) {
    const int32_t* const start = stream.start + b * stream.rows;
    for (int64_t r = begin; r < end; ++r) {
      A* const sums = to + (r - begin) * to_row;
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
        const A* const x = panel + static_cast<int64_t>(stream.column[i]) * kPitch;
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

// Places of a panel that an inner product runs over, and the elements from one to the next of b; those of a
// follow one another.
struct Places {
  int64_t height, width, row, column;
};

// Lane-wise products of a row's factor with those of kCount entries, summed over places; entries beyond
// `count` are the last one again.
template <class A, int kVectors, int kCount>
BLOKERN_INLINE void products_at(const A* a, const A* b_panel, const int32_t* column, int count,
                                const Places& places, VectorOf<A> (&products)[Vector<A>::size]) {
  constexpr int n = Vector<A>::size, lanes = kVectors * n;
  const A* x[kCount];
  for (int k = 0; k < kCount; ++k)
    x[k] = b_panel + static_cast<int64_t>(column[std::min(k, count - 1)]) * lanes;
  VectorOf<A> sum[kCount] = {};
  for (int64_t h = 0; h < places.height; ++h) {
    for (int64_t w = 0; w < places.width; ++w, a += lanes) {
      const int64_t place = h * places.row + w * places.column;
      VectorOf<A> factor[kVectors];
      for (int v = 0; v < kVectors; ++v) factor[v] = load_vector(a + v * n);
#pragma GCC unroll 16
      for (int k = 0; k < kCount; ++k) {
        for (int v = 0; v < kVectors; ++v)
          sum[k] = multiply_add(factor[v], load_vector(x[k] + place + v * n), sum[k]);
      }
    }
  }
  for (int k = 0; k < kCount; ++k) products[k] = sum[k];
}

// values ← or, with `add`, + ⟨a, b⟩ over one panel, for the entries of rows [begin, end): sums over lanes and
// places. a [rows][a_row] has row r's factor at r · a_row.
template <class A, int kVectors>
void inner_products(const Stream& stream, const A* a_panel, int64_t a_row, const A* b_panel,
                    const Places& places, A* values, bool add, int64_t begin, int64_t end) {
  constexpr int n = Vector<A>::size;
  for (int64_t b = 0; b < stream.blocks(); ++b) {
    const int32_t* const start = stream.start + b * stream.rows;
    for (int64_t r = begin; r < end; ++r) {
      const A* const row = a_panel + r * a_row;
      // As many entries as a vector has elements at a time, so that one transpose adds all of them up.
      for (int32_t i = start[r]; i < start[r + 1]; i += n) {
        const int count = std::min<int32_t>(n, start[r + 1] - i);
        const int32_t* const column = stream.column + i;
        VectorOf<A> products[n] = {};
        if (4 * count <= n)
          products_at<A, kVectors, std::max(1, n / 4)>(row, b_panel, column, count, places, products);
        else if (2 * count <= n)
          products_at<A, kVectors, n / 2>(row, b_panel, column, count, places, products);
        else
          products_at<A, kVectors, n>(row, b_panel, column, count, places, products);
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

// How many rows share their loads where all entries are kept: with n / kSharedRows entries at a time, loads
// are as few as n products allow.
template <class A>
constexpr int kSharedRows = Vector<A>::size >= 16  ? 4
                            : Vector<A>::size >= 4 ? 2
                                                   : 1;

// The same where every entry is kept, so that all rows have the columns [0, cols): values [rows][cols].
template <class A, int kVectors>
void dense_inner_products(const int32_t* column, int64_t cols, const A* a_panel, int64_t a_row,
                          const A* b_panel, const Places& places, A* values, bool add, int64_t begin,
                          int64_t end) {
  constexpr int n = Vector<A>::size, lanes = kVectors * n, kRows = kSharedRows<A>, kCount = n / kRows;
  for (int64_t r = begin; r < end; r += kRows) {
    const A* rows[kRows];  // beyond the last, the last again
    for (int64_t k = 0; k < kRows; ++k) rows[k] = a_panel + std::min(r + k, end - 1) * a_row;
    for (int64_t c = 0; c < cols; c += kCount) {
      const A* x[kCount];
      for (int64_t k = 0; k < kCount; ++k)
        x[k] = b_panel + static_cast<int64_t>(column[std::min(c + k, cols - 1)]) * lanes;
      VectorOf<A> products[n] = {};
      int64_t i = 0;
      for (int64_t h = 0; h < places.height; ++h) {
        for (int64_t w = 0; w < places.width; ++w) {
          const int64_t place = h * places.row + w * places.column;
          for (int v = 0; v < kVectors; ++v, i += n) {
            VectorOf<A> factor[kRows];
            for (int k = 0; k < kRows; ++k) factor[k] = load_vector(rows[k] + i);
#pragma GCC unroll 16
            for (int j = 0; j < kCount; ++j) {
              const VectorOf<A> other = load_vector(x[j] + place + v * n);
              for (int k = 0; k < kRows; ++k)
                products[k * kCount + j] = multiply_add(factor[k], other, products[k * kCount + j]);
            }
          }
        }
      }
      const VectorOf<A> sums = sums_of<A>(products);
      const int64_t rows_left = std::min<int64_t>(kRows, end - r),
                    cols_left = std::min<int64_t>(kCount, cols - c);
      for (int64_t k = 0; k < rows_left; ++k) {
        A* const to = values + (r + k) * cols + c;
        for (int64_t j = 0; j < cols_left; ++j) to[j] = sums[k * kCount + j] + (add ? to[j] : A(0));
      }
    }
  }
}

}  // namespace blokern

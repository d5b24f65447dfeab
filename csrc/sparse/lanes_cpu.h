// What the sparse products need beyond support/vec.h: transposes in registers, and by them copies between
// layouts, and the batch cut into panels of some samples, each [features][lanes].
#pragma once

#include <cstdint>
#include <utility>

#include "sparse/matrix.h"
#include "support/vec.h"

namespace blokern {

template <class A>
using VectorOf = typename Vector<A>::type;

template <class A>
BLOKERN_INLINE VectorOf<A> broadcast(A value) {
  return value - VectorOf<A>{};
}

// A round of a transpose swaps, between vectors kWidth apart, the elements that are kWidth off the diagonal.
// The orders are constants by way of the template: gcc 12 leaves computed ones to run time.
template <class A, int kWidth>
struct Swapped {
  static constexpr int n = Vector<A>::size;
  using Elements = std::make_integer_sequence<int, n>;
  VectorOf<A> low, high;

  BLOKERN_INLINE Swapped(VectorOf<A> p, VectorOf<A> q) : Swapped(p, q, Elements{}) {}

 private:
  template <int... j>
  BLOKERN_INLINE Swapped(VectorOf<A> p, VectorOf<A> q, std::integer_sequence<int, j...>)
      : low(__builtin_shufflevector(p, q, (j & kWidth ? n + (j ^ kWidth) : j)...)),
        high(__builtin_shufflevector(p, q, (j & kWidth ? n + j : j | kWidth)...)) {}
};

// Element j of m[i] becomes element i of m[j].
template <class A, int kWidth = 1>
BLOKERN_INLINE void transpose(VectorOf<A> (&m)[Vector<A>::size]) {
  if constexpr (kWidth < Vector<A>::size) {
#pragma GCC unroll 16
    for (int i = 0; i < Vector<A>::size; ++i) {
      if (i & kWidth) continue;
      const Swapped<A, kWidth> swapped(m[i], m[i | kWidth]);
      m[i] = swapped.low;
      m[i | kWidth] = swapped.high;
    }
    transpose<A, 2 * kWidth>(m);
  }
}

// Element i is the sum of m[i]'s elements: a transpose whose rows are added up as soon as they meet.
template <class A, int kWidth = 1>
BLOKERN_INLINE VectorOf<A> sums_of(VectorOf<A> (&m)[Vector<A>::size]) {
  if constexpr (kWidth == Vector<A>::size) {
    return m[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Vector<A>::size; i += 2 * kWidth) {
      const Swapped<A, kWidth> swapped(m[i], m[i | kWidth]);
      m[i] = swapped.low + swapped.high;
    }
    return sums_of<A, 2 * kWidth>(m);
  }
}

// to [rows, cols] ← from, whose transpose lies row after row: element (r, c) is from[c · from_stride + r].
// Both have `cols` contiguous here: columns are to's inner axis.
template <class From, class To, class A>
void copy_transposed(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows,
                     int64_t cols) {
  constexpr int n = Vector<A>::size;
  int64_t r = 0;
  for (; r + n <= rows; r += n) {
    int64_t c = 0;
    for (; c + n <= cols; c += n) {
      VectorOf<A> m[n];
      for (int i = 0; i < n; ++i) m[i] = load_vector(from + (c + i) * from_stride + r);
      transpose<A>(m);
      for (int i = 0; i < n; ++i) store_vector(to + (r + i) * to_stride + c, m[i]);
    }
    for (; c < cols; ++c) {
      for (int i = 0; i < n; ++i)
        to[(r + i) * to_stride + c] = static_cast<To>(static_cast<A>(from[c * from_stride + r + i]));
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c)
      to[r * to_stride + c] = static_cast<To>(static_cast<A>(from[c * from_stride + r]));
  }
}

template <class A, class From, class To>
BLOKERN_INLINE void copy_row(const From* from, To* to, int64_t cols) {
  constexpr int n = Vector<A>::size;
  int64_t c = 0;
  for (; c + n <= cols; c += n) store_vector(to + c, load_vector(from + c));
  for (; c < cols; ++c) to[c] = static_cast<To>(static_cast<A>(from[c]));
}

// to [rows, cols], cols innermost, from a matrix of any layout, and the other way round.
template <class A, class T>
void copy_in(const Matrix<const T>& from, A* to, int64_t to_stride, int64_t rows, int64_t cols) {
  if (from.row_stride == 1 && from.col_stride != 1)
    return copy_transposed<T, A, A>(from.data, from.col_stride, to, to_stride, rows, cols);
  for (int64_t r = 0; r < rows; ++r) {
    const T* const row = from.at(r, 0);
    A* const out = to + r * to_stride;
    if (from.col_stride == 1)
      copy_row<A>(row, out, cols);
    else
      for (int64_t c = 0; c < cols; ++c) out[c] = static_cast<A>(row[c * from.col_stride]);
  }
}

template <class A, class T>
void copy_out(const A* from, int64_t from_stride, const Matrix<T>& to, int64_t rows, int64_t cols) {
  if (to.row_stride == 1 && to.col_stride != 1)
    return copy_transposed<A, T, A>(from, from_stride, to.data, to.col_stride, cols, rows);
  for (int64_t r = 0; r < rows; ++r) {
    const A* const row = from + r * from_stride;
    T* const out = to.at(r, 0);
    if (to.col_stride == 1)
      copy_row<A>(row, out, cols);
    else
      for (int64_t c = 0; c < cols; ++c) out[c * to.col_stride] = static_cast<T>(row[c]);
  }
}

// Results of this size are no longer in cache when the next layer reads them: they are written past it.
constexpr int64_t kUncachedBytes = 8 << 20;

// Whether a result of so many elements is one, and those at multiples of `step` lie on a vector's boundary.
template <class T>
bool goes_past_cache(const T* to, int64_t elements, int64_t step) {
  return std::is_same_v<T, Accum<T>> && elements * static_cast<int64_t>(sizeof(T)) >= kUncachedBytes &&
         reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0 && step * sizeof(T) % kVectorBytes == 0;
}

// Lanes of a wide panel fill half of the vector registers with sums.
template <class A>
constexpr int64_t kWideLanes = (kVectorBytes == 64 ? 4 : 8) * Vector<A>::size;

// body(first sample, lanes of the panel) for each panel of a batch.
template <class A, class Body>
void for_each_panel(int64_t samples, Body&& body) {
  for (int64_t first = 0; first < samples;) {
    const bool wide = samples - first > kWideLanes<A> / 2;
    const int64_t lanes = wide ? kWideLanes<A> : kNarrowLanes<A>;
    body(first, lanes);
    first += lanes;
  }
}

}  // namespace blokern

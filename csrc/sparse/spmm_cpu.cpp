#include "sparse/spmm.h"

#include <algorithm>
#include <utility>

#include "support/scratch.h"

namespace blokern {
namespace {

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

// to [rows, cols], cols innermost, from a matrix of any layout, and the other way round.
template <class A, class T>
void copy_in(const Matrix<const T>& from, A* to, int64_t to_stride, int64_t rows, int64_t cols) {
  if (from.row_stride == 1 && from.col_stride != 1)
    return copy_transposed<T, A, A>(from.data, from.col_stride, to, to_stride, rows, cols);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) to[r * to_stride + c] = static_cast<A>(*from.at(r, c));
  }
}

template <class A, class T>
void copy_out(const A* from, int64_t from_stride, const Matrix<T>& to, int64_t rows, int64_t cols) {
  if (to.row_stride == 1 && to.col_stride != 1)
    return copy_transposed<A, T, A>(from, from_stride, to.data, to.col_stride, cols, rows);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) *to.at(r, c) = static_cast<T>(from[r * from_stride + c]);
  }
}

// tile [end - begin][lanes] ← the sums of rows [begin, end) over one panel, lanes = kVectors vectors. kChains
// sums a vector hide a multiply-add's latency.
template <class A, class T, int kVectors>
void multiply(const Stream& stream, const A* values, const A* panel, const T* bias, A* tile, int64_t begin,
              int64_t end) {
  constexpr int n = Vector<A>::size, lanes = kVectors * n;
  constexpr int kChains = kVectors >= 4 ? 1 : 4 / kVectors;
  for (int64_t b = 0; b < stream.blocks(); ++b) {
    const int32_t* const start = stream.start + b * stream.rows;
    for (int64_t r = begin; r < end; ++r) {
      A* const sums = tile + (r - begin) * lanes;
      VectorOf<A> sum[kChains][kVectors] = {};
      for (int v = 0; v < kVectors; ++v) {
        if (b > 0) sum[0][v] = load_vector(sums + v * n);
        if (b == 0 && bias != nullptr) sum[0][v] = broadcast(static_cast<A>(bias[r]));
      }
      int32_t i = start[r];
      const auto add = [&](int chain) {
        const VectorOf<A> weight = broadcast(values[i]);
        const A* const x = panel + static_cast<int64_t>(stream.column[i]) * lanes;
        for (int v = 0; v < kVectors; ++v)
          sum[chain][v] = multiply_add(weight, load_vector(x + v * n), sum[chain][v]);
        ++i;
      };
      if constexpr (kChains > 1) {
        for (const int32_t last = start[r + 1] - kChains; i <= last;) {
          for (int chain = 0; chain < kChains; ++chain) add(chain);
        }
      }
      while (i < start[r + 1]) add(0);
      for (int v = 0; v < kVectors; ++v) {
        for (int chain = 1; chain < kChains; ++chain) sum[0][v] += sum[chain][v];
        store_vector(sums + v * n, sum[0][v]);
      }
    }
  }
}

// values ← (first panel) or + ⟨a, b⟩ over one panel, for the entries of rows [begin, end).
template <class A, int kVectors>
void inner_products(const Stream& stream, const A* a_panel, const A* b_panel, A* values, bool add,
                    int64_t begin, int64_t end) {
  constexpr int n = Vector<A>::size, lanes = kVectors * n;
  for (int64_t b = 0; b < stream.blocks(); ++b) {
    const int32_t* const start = stream.start + b * stream.rows;
    for (int64_t r = begin; r < end; ++r) {
      VectorOf<A> a[kVectors];
      for (int v = 0; v < kVectors; ++v) a[v] = load_vector(a_panel + r * lanes + v * n);
      for (int32_t i = start[r]; i < start[r + 1]; i += n) {
        // As many entries as a vector has elements at a time; where a row has fewer left, its last one again.
        const int count = std::min<int32_t>(n, start[r + 1] - i);
        VectorOf<A> products[n];
        for (int k = 0; k < n; ++k) {
          const A* const x =
              b_panel + static_cast<int64_t>(stream.column[i + std::min(k, count - 1)]) * lanes;
          products[k] = a[0] * load_vector(x);
          for (int v = 1; v < kVectors; ++v)
            products[k] = multiply_add(a[v], load_vector(x + v * n), products[k]);
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

}  // namespace

template <class T>
void pack_panels(const Matrix<const T>& x, int64_t features, int64_t samples, Accum<T>* panels, int64_t begin,
                 int64_t end) {
  for_each_panel<Accum<T>>(samples, [&](int64_t first, int64_t lanes) {
    const int64_t count = std::min(lanes, samples - first);
    Accum<T>* const panel = panels + features * first + begin * lanes;
    copy_in<Accum<T>, T>({x.at(begin, first), x.row_stride, x.col_stride}, panel, lanes, end - begin, count);
    if (count == lanes) return;
    for (int64_t f = 0; f < end - begin; ++f)
      std::fill(panel + f * lanes + count, panel + (f + 1) * lanes, Accum<T>(0));
  });
}

template <class T>
void gather_values(const Stream& stream, const Matrix<const T>& weight, Accum<T>* values, int64_t begin,
                   int64_t end) {
  for (int64_t b = 0; b < stream.blocks(); ++b) {
    const int32_t* const start = stream.start + b * stream.rows;
    for (int64_t r = begin; r < end; ++r) {
      const T* const row = weight.at(r, 0);
      for (int32_t i = start[r]; i < start[r + 1]; ++i)
        values[i] = static_cast<Accum<T>>(row[stream.column[i] * weight.col_stride]);
    }
  }
}

template <class T>
void scatter_values(const Stream& stream, const Accum<T>* values, T* dense, int64_t begin, int64_t end) {
  std::fill(dense + begin * stream.cols, dense + end * stream.cols, T(0));
  for (int64_t b = 0; b < stream.blocks(); ++b) {
    const int32_t* const start = stream.start + b * stream.rows;
    for (int64_t r = begin; r < end; ++r) {
      for (int32_t i = start[r]; i < start[r + 1]; ++i)
        dense[r * stream.cols + stream.column[i]] = static_cast<T>(values[i]);
    }
  }
}

template <class T>
void spmm(const Stream& stream, const Accum<T>* values, const Accum<T>* panels, const T* bias,
          const Matrix<T>& y, int64_t samples, int64_t begin, int64_t end) {
  using A = Accum<T>;
  constexpr int n = Vector<A>::size;
  A* const tile = scratch<A>((end - begin) * kWideLanes<A>);
  for_each_panel<A>(samples, [&](int64_t first, int64_t lanes) {
    const A* const panel = panels + stream.cols * first;
    if (lanes == kWideLanes<A>)
      multiply<A, T, kWideLanes<A> / n>(stream, values, panel, bias, tile, begin, end);
    else
      multiply<A, T, kNarrowLanes<A> / n>(stream, values, panel, bias, tile, begin, end);
    const Matrix<T> to{y.at(begin, first), y.row_stride, y.col_stride};
    copy_out<A, T>(tile, lanes, to, end - begin, std::min(lanes, samples - first));
  });
}

template <class A>
void sddmm(const Stream& stream, const A* a_panels, const A* b_panels, A* values, int64_t samples,
           int64_t begin, int64_t end) {
  constexpr int n = Vector<A>::size;
  for_each_panel<A>(samples, [&](int64_t first, int64_t lanes) {
    const A* const a = a_panels + stream.rows * first;
    const A* const b = b_panels + stream.cols * first;
    if (lanes == kWideLanes<A>)
      inner_products<A, kWideLanes<A> / n>(stream, a, b, values, first > 0, begin, end);
    else
      inner_products<A, kNarrowLanes<A> / n>(stream, a, b, values, first > 0, begin, end);
  });
}

#define INSTANTIATE(T)                                                                                 \
  template void pack_panels<T>(const Matrix<const T>&, int64_t, int64_t, Accum<T>*, int64_t, int64_t); \
  template void gather_values<T>(const Stream&, const Matrix<const T>&, Accum<T>*, int64_t, int64_t);  \
  template void scatter_values<T>(const Stream&, const Accum<T>*, T*, int64_t, int64_t);               \
  template void spmm<T>(const Stream&, const Accum<T>*, const Accum<T>*, const T*, const Matrix<T>&,   \
                        int64_t, int64_t, int64_t);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(c10::BFloat16)
#undef INSTANTIATE
template void sddmm<double>(const Stream&, const double*, const double*, double*, int64_t, int64_t, int64_t);
template void sddmm<float>(const Stream&, const float*, const float*, float*, int64_t, int64_t, int64_t);

}  // namespace blokern

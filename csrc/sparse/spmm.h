// The products of a masked matrix W [rows, cols], weights where the mask is 1:
//   spmm:  Y = W X,  X [cols, samples];        sddmm:  (A Bᵀ) where the mask is 1,  A [rows, samples], B
//   [cols, samples].
// Each is the other's derivative. Samples lie in the vector lanes: X is packed into panels of some samples,
// each [features][lanes], so that a weight is one broadcast and a multiply-add a vector.
#pragma once

#include <cstdint>

#include "sparse/stream.h"
#include "support/vec.h"

namespace blokern {

// A matrix in memory of any layout.
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, col_stride;

  T* at(int64_t row, int64_t col) const { return data + row * row_stride + col * col_stride; }
};

// Lanes of a wide panel fill half of the vector registers with sums; those of a narrow one, for few samples
// and for what the wide ones leave, a cache line.
template <class A>
constexpr int64_t kNarrowLanes = 64 / sizeof(A);
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

// Samples with the last panel's idle lanes, which hold zeros.
template <class A>
int64_t padded(int64_t samples) {
  int64_t total = 0;
  for_each_panel<A>(samples, [&](int64_t, int64_t lanes) { total += lanes; });
  return total;
}

// Rows [begin, end) of X [features, samples] into panels; that of sample s begins at panels + features · s.
template <class T>
void pack_panels(const Matrix<const T>& x, int64_t features, int64_t samples, Accum<T>* panels, int64_t begin,
                 int64_t end);

// values[i] ← the weight of the stream's i-th entry, for rows [begin, end). No other weight is read.
template <class T>
void gather_values(const Stream& stream, const Matrix<const T>& weight, Accum<T>* values, int64_t begin,
                   int64_t end);

// Rows [begin, end) of a dense [rows, cols] that holds the values, and zeros elsewhere.
template <class T>
void scatter_values(const Stream& stream, const Accum<T>* values, T* dense, int64_t begin, int64_t end);

// Rows [begin, end) of Y [rows, samples] = W X + bias.
template <class T>
void spmm(const Stream& stream, const Accum<T>* values, const Accum<T>* panels, const T* bias,
          const Matrix<T>& y, int64_t samples, int64_t begin, int64_t end);

// values[i] ← ⟨row of A, row of B⟩ at the stream's i-th entry, for rows [begin, end).
template <class A>
void sddmm(const Stream& stream, const A* a_panels, const A* b_panels, A* values, int64_t samples,
           int64_t begin, int64_t end);

}  // namespace blokern

// The products of a masked matrix W [rows, cols], weights where the mask is 1:
//   spmm:  Y = W X,  X [cols, samples];        sddmm:  (A Bᵀ) where the mask is 1,  A [rows, samples], B
//   [cols, samples].
// Each is the other's derivative. Samples lie in the vector lanes: X is packed into panels of some samples,
// each [features][lanes], so that a weight is one broadcast and a multiply-add a vector.
#pragma once

#include <cstdint>

#include "sparse/matrix.h"
#include "sparse/stream.h"

namespace blokern {

// Samples with the last panel's idle lanes, which hold zeros.
template <class A>
int64_t padded(int64_t samples);

// Rows [begin, end) of X [features, samples] into panels; that of sample s begins at panels + features · s.
template <class T>
void pack_panels(const Matrix<const T>& x, int64_t features, int64_t samples, Accum<T>* panels, int64_t begin,
                 int64_t end);

// values[i] ← the weight of the stream's i-th entry, for rows [begin, end). No other weight is read.
template <class T>
void gather_values(const Stream& stream, const Matrix<const T>& weight, Accum<T>* values, int64_t begin,
                   int64_t end);

// The same for a matrix whose columns are contiguous, the transpose of one with stream `other`: its rows
// are read one after the other, so that every cache line of the weight comes once. For blocks [begin, end)
// of the stream.
template <class T>
void gather_transposed(const Stream& stream, const Stream& other, const Matrix<const T>& weight,
                       Accum<T>* values, int64_t begin, int64_t end);

// The other way round; the weight's other elements stay as they are.
template <class T>
void scatter_values(const Stream& stream, const Accum<T>* values, const Matrix<T>& weight, int64_t begin,
                    int64_t end);

// Rows [begin, end) of product [rows, cols], contiguous: the values where the mask is 1, else zeros.
template <class T>
void spread_values(const Stream& stream, const Accum<T>* values, T* product, int64_t begin, int64_t end);

// Rows [begin, end) of Y [rows, samples] = W X + bias.
template <class T>
void spmm(const Stream& stream, const Accum<T>* values, const Accum<T>* panels, const T* bias,
          const Matrix<T>& y, int64_t samples, int64_t begin, int64_t end);

// The most samples for which a multiply-add each, entry by entry, costs no more than one of a whole panel;
// measured at 2048 × 2048.
constexpr int64_t kFewSamples = 3;

// spmm of so few samples, which are the rows of x.
template <class T>
void spmm_few(const Stream& stream, const Accum<T>* values, const Matrix<const Accum<T>>& x, const T* bias,
              const Matrix<T>& y, int64_t samples, int64_t begin, int64_t end);

// values[i] ← ⟨row of A, row of B⟩ at the stream's i-th entry, for rows [begin, end).
template <class A>
void sddmm(const Stream& stream, const A* a_panels, const A* b_panels, A* values, int64_t samples,
           int64_t begin, int64_t end);

}  // namespace blokern

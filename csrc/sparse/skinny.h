// The products of a masked matrix W [rows, cols] with few samples. Then W is what there is to read, so that
// it is read as it lies, row after row, its bits masking the vectors: columns lie in the lanes, and nothing
// is gathered.
#pragma once

#include <cstdint>

#include "sparse/matrix.h"
#include "sparse/stream.h"

namespace blokern {

// The most samples that the kernels take.
constexpr int64_t kSkinnySamples = 16;

// Whether reading all of W costs less than gathering the entries that are kept; measured at 2048 × 2048.
inline bool is_skinny(int64_t kept, int64_t rows, int64_t cols, int64_t samples) {
  const double density = static_cast<double>(kept) / (static_cast<double>(rows) * static_cast<double>(cols));
  return samples <= kSkinnySamples && density >= 0.03 && static_cast<double>(samples) <= 100 * density;
}

// A matrix of which rows [samples] follow one another at this distance, a multiple of 64, zeros
// beyond their ends.
template <class A>
struct SkinnyRows {
  A* data;
  int64_t stride;

  A* row(int64_t s) const { return data + s * stride; }
};

// X [features, samples] as `to`, its samples as rows; features [begin, end).
template <class T>
void pack_rows(const Matrix<const T>& x, int64_t samples, const SkinnyRows<Accum<T>>& to, int64_t begin,
               int64_t end);

// Rows [begin, end) of Y [rows, samples] = W X + bias; W's rows are contiguous.
template <class T>
void skinny_multiply(const MaskWords& mask, const Matrix<const T>& weight, const SkinnyRows<Accum<T>>& x,
                     const T* bias, const Matrix<T>& y, int64_t samples, int64_t begin, int64_t end);

// Columns 64 · [begin, end) of sums, samples as rows, = Wᵀ A; A [rows, samples].
template <class T>
void skinny_multiply_transposed(const MaskWords& mask, const Matrix<const T>& weight,
                                const Matrix<const T>& a, const SkinnyRows<Accum<T>>& sums, int64_t samples,
                                int64_t begin, int64_t end);

// Rows [begin, end) of product [rows, cols], contiguous, = A Bᵀ where the mask is 1, else 0; A [rows,
// samples], B's samples as rows.
template <class T>
void skinny_outer(const MaskWords& mask, const Matrix<const T>& a, const SkinnyRows<Accum<T>>& b, T* product,
                  int64_t samples, int64_t begin, int64_t end);

// Rows [begin, end) of W ⊙ mask [rows, cols], contiguous.
template <class T>
void apply_mask(const MaskWords& mask, const Matrix<const T>& weight, T* to, int64_t begin, int64_t end);

}  // namespace blokern

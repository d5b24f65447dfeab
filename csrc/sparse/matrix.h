// Matrices in memory and the working memory of products: what the kernels share with those who call them, the
// same whatever the instruction set.
#pragma once

#include <cstdint>

#include "support/math.h"

namespace blokern {

// A matrix in memory of any layout.
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, col_stride;

  T* at(int64_t row, int64_t col) const { return data + row * row_stride + col * col_stride; }
};

// Slots of a thread's scratch memory.
constexpr int kFactor = 1, kOtherFactor = 2, kValues = 3, kTile = 4, kSums = 5;

// The lanes of a narrow panel, for few samples and for what the wide ones leave: a cache line.
template <class A>
constexpr int64_t kNarrowLanes = 64 / sizeof(A);

}  // namespace blokern

// nm_mask: the n largest of every m consecutive scores, equal ones in the order of their indices.
#pragma once

#include <cstdint>

#include "sparse/order.h"
#include "support/cuda/call.h"

namespace blokern {

// Scores [rows, m, inner] and their mask: group g is column g % inner of row g / inner.
template <class T>
struct NmMask {
  const T* scores;
  bool* mask;
  int64_t n, m, inner;
  int64_t groups;
};

// Groups [begin, end); returns whether a score is NaN.
template <class T>
bool nm_mask(const NmMask<T>& p, int64_t begin, int64_t end);

// CUDA kernel, queued on the call's stream; *ok ← 0 where a score is NaN.
template <class T>
void nm_mask(const NmMask<T>& p, int* ok, const CudaCall& call);

}  // namespace blokern

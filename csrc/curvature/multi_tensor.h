// Inner products and updates of vectors that are lists of tensors, for iterations that solve by
// products: dot, axpby, and the update of conjugate gradients. A tensor is a stack of columns, one dense
// behind another. Coefficients, one a column, are read where they lie, in a device's memory: no
// iteration waits for one.
#pragma once

#include <cstdint>
#include <span>

#include "support/cuda/call.h"
#include "support/math.h"

namespace blokern {

template <class T>
struct Dot {
  const T* a;
  const T* b;
};

// y ← a x + b y. What a coefficient of 0 stands before is not read, so that a NaN there is of no effect.
template <class T>
struct Axpby {
  T* y;
  const T* x;
  const double* a;
  const double* b;
};

template <class V>
BLOKERN_INLINE V axpby_formula(V y, V x, V a, V b) {
  return a * x + b * y;
}

// x ← x + α p and r ← r − α A p, for the sum of r². An α of 0 leaves both, whatever p and A p are. p
// may be r.
template <class T>
struct CgUpdate {
  T* x;
  T* r;
  const T* p;
  const T* ap;
  const double* alpha;
};

template <class V>
struct CgStep {
  V x, r;
};

template <class V>
BLOKERN_INLINE CgStep<V> cg_update_formula(V x, V r, V p, V ap, V alpha) {
  return {x + alpha * p, r - alpha * ap};
}

// CPU kernels, for the tensor's elements [begin, end), which are of one column; the sums are of these
// alone. Columns are worked on in blocks of this many elements, each summed by itself: sums do not
// depend on threads.
constexpr int64_t kMultiTensorBlock = 16384;
template <class T>
double dot(const Dot<T>& p, int64_t column, int64_t begin, int64_t end);
template <class T>
void axpby(const Axpby<T>& p, int64_t column, int64_t begin, int64_t end);
template <class T>
double cg_update(const CgUpdate<T>& p, int64_t column, int64_t begin, int64_t end);

// CUDA kernels, for whole lists of one type. Their blocks are of so many elements, and each leaves its sum in
// a place of its own: columns' sums do not depend on what else is in a launch.
constexpr int64_t kMultiTensorCudaBlock = 4096;
constexpr int64_t multi_tensor_cuda_blocks(int64_t column_size) {
  return (column_size + kMultiTensorCudaBlock - 1) / kMultiTensorCudaBlock;
}

template <class P>
struct ListTensor {
  P p;
  int64_t size;   // of a column
  int64_t place;  // of its first block's sum in a column's sums
};

struct BlockSums {
  double* values;  // [columns, count]
  int64_t columns, count;
};

template <class T>
void dot(std::span<const ListTensor<Dot<T>>> list, const BlockSums& sums, const CudaCall& call);
template <class T>
void axpby(std::span<const ListTensor<Axpby<T>>> list, int64_t columns, const CudaCall& call);
template <class T>
void cg_update(std::span<const ListTensor<CgUpdate<T>>> list, const BlockSums& sums, const CudaCall& call);
// total[k] ← the sum of column k's.
void total_of_blocks(const BlockSums& sums, double* total, const CudaCall& call);

}  // namespace blokern

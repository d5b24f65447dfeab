// Inner products and updates of vectors that are lists of tensors, for iterations that solve by products:
// dot, axpby, and the update of conjugate gradients. Coefficients are read where they lie, in a device's
// memory: no iteration waits for one.
#pragma once

#include <cstdint>

#include "support/math.h"

namespace blokern {

// A list's elements are worked on in blocks of this many, each summed by itself: sums do not depend on
// threads.
constexpr int64_t kMultiTensorBlock = 16384;

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

// x ← x + α p and r ← r − α A p, for the sum of r². An α of 0 leaves both, whatever p and A p are. p may be
// r.
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

// CPU kernels, for elements [begin, end); the sums are of these alone.
template <class T>
double dot(const Dot<T>& p, int64_t begin, int64_t end);
template <class T>
void axpby(const Axpby<T>& p, int64_t begin, int64_t end);
template <class T>
double cg_update(const CgUpdate<T>& p, int64_t begin, int64_t end);

}  // namespace blokern

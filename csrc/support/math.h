// The words the kernels' formulas are written in, for scalars on host and device.
// support/vec.h gives the same words for SIMD registers, so that one formula serves them all.
#pragma once

#include <cmath>
#include <type_traits>

// A formula is code within its kernel, never a call: lanes passed through memory cost more than the formula.
#if defined(__CUDACC__)
#define BLOKERN_INLINE __host__ __device__ __forceinline__
#else
#define BLOKERN_INLINE __attribute__((always_inline)) inline
#endif

namespace blokern {

template <class A>
using EnableScalar = std::enable_if_t<std::is_floating_point_v<A>, A>;

// A NaN in v stays; where lo > hi, hi wins.
template <class A>
BLOKERN_INLINE EnableScalar<A> clamp(A v, A lo, A hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

// −1, 0 or 1; 0 for NaN, as torch.sign.
template <class A>
BLOKERN_INLINE EnableScalar<A> sign(A v) {
  return static_cast<A>(v > A(0)) - static_cast<A>(v < A(0));
}

template <class A>
BLOKERN_INLINE EnableScalar<A> absolute(A v) {
  return v < A(0) ? -v : v;
}

template <class A>
BLOKERN_INLINE EnableScalar<A> larger(A a, A b) {
  return a > b ? a : b;
}

template <class A, class = EnableScalar<A>>
BLOKERN_INLINE bool less(A a, A b) {
  return a < b;
}

template <class A>
BLOKERN_INLINE EnableScalar<A> where(bool condition, A a, A b) {
  return condition ? a : b;
}

}  // namespace blokern

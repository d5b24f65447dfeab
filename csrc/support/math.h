// The words the kernels' formulas are written in, for scalars on host and device.
// support/vec.h gives the same words for SIMD registers, so that one formula serves them all.
#pragma once

#include <cmath>
#include <type_traits>

#if defined(__CUDACC__)
#define BLOKERN_HOST_DEVICE __host__ __device__
#else
#define BLOKERN_HOST_DEVICE
#endif

namespace blokern {

template <class A>
using EnableScalar = std::enable_if_t<std::is_floating_point_v<A>, A>;

// A NaN in v stays; where lo > hi, hi wins.
template <class A>
BLOKERN_HOST_DEVICE inline EnableScalar<A> clamp(A v, A lo, A hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

// −1, 0 or 1; 0 for NaN, as torch.sign.
template <class A>
BLOKERN_HOST_DEVICE inline EnableScalar<A> sign(A v) {
  return static_cast<A>(v > A(0)) - static_cast<A>(v < A(0));
}

template <class A>
BLOKERN_HOST_DEVICE inline EnableScalar<A> absolute(A v) {
  return v < A(0) ? -v : v;
}

template <class A>
BLOKERN_HOST_DEVICE inline EnableScalar<A> larger(A a, A b) {
  return a > b ? a : b;
}

template <class A, class = EnableScalar<A>>
BLOKERN_HOST_DEVICE inline bool less(A a, A b) {
  return a < b;
}

template <class A>
BLOKERN_HOST_DEVICE inline EnableScalar<A> where(bool condition, A a, A b) {
  return condition ? a : b;
}

}  // namespace blokern

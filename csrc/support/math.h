// The words the kernels' formulas are written in, for scalars on host and device.
// support/vec.h gives the same words for SIMD registers, so that one formula serves them all.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

// A formula is code within its kernel, never a call: lanes passed through memory cost more than the formula.
#if defined(__CUDACC__)
#define BLOKERN_INLINE __host__ __device__ __forceinline__
#else
#define BLOKERN_INLINE __attribute__((always_inline)) inline
#endif

namespace blokern {

// Arithmetic happens in float for half types and float, in double for double.
template <class T>
using Accum = std::conditional_t<std::is_same_v<T, double>, double, float>;

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

template <class A>
struct CosSin {
  A cosine, sine;
};

// Of an angle of `turns` whole turns.
template <class A>
BLOKERN_INLINE CosSin<A> cos_sin_of_turn(A turns) {
  CosSin<A> of;
#if defined(__CUDA_ARCH__)
  // The functions of π·x need no reduction of large arguments, which would cost a stack frame.
  if constexpr (sizeof(A) == sizeof(float))
    sincospif(2 * turns, &of.sine, &of.cosine);
  else
    sincospi(2 * turns, &of.sine, &of.cosine);
#else
  of.cosine = std::cos(A(6.283185307179586) * turns);
  of.sine = std::sin(A(6.283185307179586) * turns);
#endif
  return of;
}

template <class A>
BLOKERN_INLINE EnableScalar<A> exponential(A v) {
  return std::exp(v);
}

// Half of erfc(v / √2), the normal distribution's tail beyond v ≥ 0; bell = e^(−v² / 2), for those that can
// use it.
template <class A>
BLOKERN_INLINE EnableScalar<A> normal_tail(A v, A /*bell*/) {
  return A(0.5) * std::erfc(v * A(0.7071067811865476));
}

}  // namespace blokern

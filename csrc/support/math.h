// The words the kernels' formulas are written in, for scalars on host and device.
// support/vec.h gives the same words for SIMD registers, so that one formula serves them all.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
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

// A float's bits, one number lower where `wanted` is all ones; it is zero elsewhere.
template <class B>
BLOKERN_INLINE B next_lower(B bits, B wanted) {
  const B negative = B{} - (bits >> 31);
  return bits + ((wanted ^ negative) - negative);
}

// A float's bits, rounded down to those without the `kDropped` lowest.
template <uint32_t kDropped, class B>
BLOKERN_INLINE B floored(B bits) {
  return (bits + ((B{} - (bits >> 31)) & kDropped)) & ~kDropped;
}

BLOKERN_INLINE uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}
BLOKERN_INLINE float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

template <uint32_t kDropped>
BLOKERN_INLINE float floor_bits(float v) {
  return float_of(floored<kDropped>(bits_of(v)));
}

// v, its sign turned where that of `by` is set.
BLOKERN_INLINE float mirrored(float v, float by) {
  return float_of(bits_of(v) ^ (bits_of(by) & 0x80000000u));
}

BLOKERN_INLINE float next_lower_where(bool wanted, float v) {
  return float_of(next_lower(bits_of(v), wanted ? ~uint32_t{0} : uint32_t{0}));
}

// The largest float that is at most a + b; its zero may have either sign.
template <class V>
BLOKERN_INLINE V add_down_exactly(V a, V b) {
  const V sum = a + b;
  const V of_b = sum - a;
  const V lost = (a - (sum - of_b)) + (b - of_b);  // what rounding took: Knuth's two-sum
  return next_lower_where(less(lost, V(0.0f)), sum);
}
BLOKERN_INLINE float add_down(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rd(a, b);
#else
  return add_down_exactly(a, b);
#endif
}

// The largest float16 that is at most v, in a float.
template <class V>
BLOKERN_INLINE V floor_to_half_by_steps(V v) {
  const V most(65504.0f), step(5.9604644775390625e-08f);  // below 2^-14 float16s are multiples of 2^-24
  const V coarse = floor_bits<0x1fffu>(v);
  const V bounded =
      where(less(most, coarse) & less(coarse, V(std::numeric_limits<float>::infinity())), most, coarse);
  const V nearest = (v + V(0.75f)) - V(0.75f);
  const V fine = where(less(v, nearest), nearest - step, nearest);
  return where(less(absolute(v), V(6.103515625e-05f)), fine, bounded);
}
BLOKERN_INLINE float floor_to_half(float v) { return floor_to_half_by_steps(v); }

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

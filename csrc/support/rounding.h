// Directed rounding to half types, the same bits on every processor. The words are those of support/math.h
// and support/vec.h.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "support/math.h"

namespace blokern {

template <class T>
constexpr bool kIsHalf = std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, c10::Half>;

// The largest T that is at most v, in a float.
template <class T, class V>
BLOKERN_INLINE V floor_to(V v) {
  static_assert(kIsHalf<T>);
  if constexpr (std::is_same_v<T, c10::Half>) return floor_to_half(v);
  return floor_bits<0xffffu>(v);  // a bfloat16 is a float's upper half
}

// The largest T that is at most a + b, the exact sum; for float and double the sum, rounded to the nearest. A
// half type's zero may have either sign: add V(0) to what is stored.
template <class T, class V>
BLOKERN_INLINE V sum_below(V a, V b) {
  if constexpr (kIsHalf<T>) return floor_to<T>(add_down(a, b));
  return a + b;
}

// The smallest T that is at least a + b.
template <class T, class V>
BLOKERN_INLINE V sum_above(V a, V b) {
  if constexpr (kIsHalf<T>) return V(0.0f) - sum_below<T>(-a, -b);
  return a + b;
}

// x + step as a T that is no farther from x than |step|: rounded down, in the mirror where step is negative.
template <class T, class V>
BLOKERN_INLINE V move_within(V x, V step) {
  if constexpr (kIsHalf<T>)
    return mirrored(sum_below<T>(mirrored(x, step), mirrored(step, step)), step) + V(0.0f);
  else
    return x + step;
}

// v, clamped to [x − radius, x + radius]; half types to those of their numbers that lie in it. One of the
// two bounds is in v's way: the upper one, in the mirror where v < x.
template <class T, class V>
BLOKERN_INLINE V clamp_around(V v, V x, V radius) {
  if constexpr (kIsHalf<T>) {
    const V side = v - x;
    const V bound = sum_below<T>(mirrored(x, side), radius);
    const V inside = mirrored(v, side);
    return mirrored(where(less(bound, inside), bound, inside), side) + V(0.0f);
  } else {
    return clamp(v, x - radius, x + radius);
  }
}

// The largest float that is at most v.
BLOKERN_INLINE float float_below(double v) {
  const float nearest = static_cast<float>(v);
  return next_lower_where(static_cast<double>(nearest) > v, nearest);
}

}  // namespace blokern

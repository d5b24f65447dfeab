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

// The largest T that is at most a + b, the exact sum; for float and double the sum, rounded to the nearest.
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

// x + step as a T that is no farther from x than |step|.
template <class T, class V>
BLOKERN_INLINE V move_within(V x, V step) {
  if constexpr (kIsHalf<T>) {
    const auto down = less(step, V(0.0f));
    const V moved = sum_below<T>(where(down, -x, x), absolute(step));
    return where(down, V(0.0f) - moved, moved);
  }
  return x + step;
}

// The largest float that is at most v.
BLOKERN_INLINE float float_below(double v) {
  const float nearest = static_cast<float>(v);
  return next_lower_where(static_cast<double>(nearest) > v, nearest);
}

}  // namespace blokern

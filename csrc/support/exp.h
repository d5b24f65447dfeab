// The words exponential and normal_tail of support/math.h, for SIMD registers.
#pragma once

#include <cmath>
#include <cstdint>

#include "support/math.h"
#include "support/vec.h"

namespace blokern {

// One element at a time: double is for checking.
BLOKERN_INLINE Vector<double>::type exponential_vector(Vector<double>::type x) {
  for (int i = 0; i < Vector<double>::size; ++i) x[i] = std::exp(x[i]);
  return x;
}

// e^x = 2^n e^r with |r| ≤ ln 2 / 2 and a polynomial for e^r (Cephes): within 2 ulp for x in [−87.3, 88], 0
// below, infinity above; a NaN stays one.
BLOKERN_INLINE Floats exponential_vector(Floats x) {
  using Ints = decltype(x < x);
  const Floats zero{};
  const Floats low = zero - 87.3f, high = zero + 88.7f;
  const auto too_low = x<low, too_high = x> high;
  Floats v = too_low ? low : too_high ? high : x;
  // Adding 1.5 · 2^23 rounds to an integer, which then stands in the sum's last bits.
  const Floats magic = zero + 12582912.0f;
  const Floats sum = v * 1.44269504f + magic;
  const Floats n = sum - magic;
  v = (v - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = v * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * v + 8.3334519073e-3f;
  p = p * v + 4.1665795894e-2f;
  p = p * v + 1.6666665459e-1f;
  p = p * v + 5.0000001201e-1f;
  p = p * (v * v) + v + 1.0f;
  const auto exponent = (bit_copy<Ints>(sum) - bit_copy<Ints>(magic) + 127) << 23;
  p = p * bit_copy<Floats>(exponent);
  return too_low ? zero : too_high ? zero + INFINITY : p;
}

template <class A>
BLOKERN_INLINE Lanes<A> exponential(Lanes<A> x) {
  for (auto& part : x.v) part = exponential_vector(part);
  return x;
}

BLOKERN_INLINE Lanes<double> normal_tail(Lanes<double> z, const Lanes<double>& /*bell*/) {
  for (auto& part : z.v) {
    for (int i = 0; i < Vector<double>::size; ++i) part[i] = 0.5 * std::erfc(part[i] * 0.7071067811865476);
  }
  return z;
}

// Within 1e-7 (Abramowitz and Stegun, 7.1.26).
BLOKERN_INLINE Lanes<float> normal_tail(const Lanes<float>& z, const Lanes<float>& bell) {
  using V = Lanes<float>;
  const V t = V(1.0f) / (V(1.0f) + V(0.23164189f) * z);  // 0.3275911 / √2
  V p = V(1.061405429f) * t + V(-1.453152027f);
  p = p * t + V(1.421413741f);
  p = p * t + V(-0.284496736f);
  p = p * t + V(0.254829592f);
  return V(0.5f) * p * t * bell;
}

}  // namespace blokern

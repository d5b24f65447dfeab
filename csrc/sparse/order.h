// Scores as unsigned integers of the same order: −∞ < … < −0 = +0 < … < +∞ < NaN. Selection then compares
// integers alone; a floating-point comparison may take denormals for zeros, as each thread's own mode says.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cstdint>

#include "support/math.h"

namespace blokern {

// Keys are uint32_t for scores that float32 holds, uint64_t for those that float64 holds: exact for each.
template <class K>
constexpr K kSignBit = K(1) << (8 * sizeof(K) - 1);
template <class K>
constexpr K kInfinityBits = sizeof(K) == 4 ? K(0x7f800000) : K(0x7ff0000000000000);
// Every NaN's key.
template <class K>
constexpr K kNanKey = ~K(0);

template <class K, class T>
BLOKERN_INLINE K score_bits(T score) {
  if constexpr (sizeof(T) == sizeof(K)) {
    return std::bit_cast<K>(score);
  } else if constexpr (sizeof(K) == 4) {
    return std::bit_cast<uint32_t>(static_cast<float>(score));
  } else {
    const uint32_t bits = score_bits<uint32_t>(score), magnitude = bits & ~kSignBit<uint32_t>;
    // A float's denormal is normal as a double, and is made from an integer: the conversion might flush it.
    const double wide = magnitude < 0x00800000 ? magnitude * 0x1p-149 : std::bit_cast<float>(magnitude);
    return std::bit_cast<uint64_t>(wide) | static_cast<uint64_t>(bits & kSignBit<uint32_t>) << 32;
  }
}

template <class K, class T>
BLOKERN_INLINE K order_key(T score) {
  const K bits = score_bits<K>(score), magnitude = bits & ~kSignBit<K>;
  const K key = bits & kSignBit<K> ? kSignBit<K> - magnitude : kSignBit<K> + magnitude;
  return magnitude > kInfinityBits<K> ? kNanKey<K> : key;
}

}  // namespace blokern

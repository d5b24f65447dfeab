// Philox4x32-10 (Salmon et al., SC 2011): counters in, random words out, no state. The same words
// on every device.
#pragma once

#include <cstdint>

#include "support/math.h"

namespace blokern {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// One round on one counter c[0..3] under the key (k0, k1).
BLOKERN_INLINE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0,
                                 uint32_t k1) {
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  c1 = static_cast<uint32_t>(p1);
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c3 = static_cast<uint32_t>(p0);
}

struct PhiloxWords {
  uint32_t v[4];
};

BLOKERN_INLINE PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// In (0, 1), from a word's upper 24 bits: one value for every dtype and device. The lower 8 bits stay unused.
template <class A>
BLOKERN_INLINE A uniform(uint32_t word) {
  return (static_cast<A>(word >> 8) + A(0.5)) * static_cast<A>(1.0 / (1 << 24));
}

}  // namespace blokern

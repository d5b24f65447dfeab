// random_start: x + δ clipped to the box, δ uniform in the ball of radius eps.
//
// Randomness is Philox under one 64-bit seed a call. Element i of sample n is word i % 4 of the counter
// (i / 4 low, i / 4 high, n, stream): stream 0 has the elements, stream 1 (word 0 of block 0) the sample's
// one further draw. A sample's δ therefore depends on the seed, its index and its shape alone: not on the
// batch or on threads.
#pragma once

#include <cstdint>

#include "attack/ball.h"
#include "attack/batch.h"
#include "support/philox.h"

namespace blokern {

template <class T>
struct RandomStart {
  using Image = T;
  Batch batch;
  Rows<const T> x;
  Rows<T> out;
  PerSample eps;
  Box clip;
  uint64_t seed;
};

// CPU kernels; [begin, end) counts samples.
template <class T>
void random_start_linf(const RandomStart<T>& p, int64_t begin, int64_t end);
template <class T>
void random_start_l2(const RandomStart<T>& p, int64_t begin, int64_t end);
template <class T>
void random_start_l1(const RandomStart<T>& p, int64_t begin, int64_t end);

}  // namespace blokern

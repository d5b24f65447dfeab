// random_start: x + δ clipped to the box, δ uniform in the ball of radius eps.
//
// Randomness is Philox under one 64-bit seed a call. Element i of sample n is word i % 4 of the counter
// (i / 4 low, i / 4 high, n, stream): stream 0 has the elements, stream 1 (word 0 of block 0) the sample's
// one further draw. A sample's δ therefore depends on the seed, its index and its shape alone: not on the
// batch or on threads. Indices run from `first` on: a part of a batch draws what it would within the whole.
#pragma once

#include <cstdint>

#include "attack/ball.h"
#include "attack/batch.h"
#include "support/cuda/call.h"
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
  int64_t first;
};

enum Stream : uint32_t { kElements = 0, kSample = 1 };

template <class A>
BLOKERN_INLINE A linf_draw(uint32_t word) {
  return A(2) * uniform<A>(word) - A(1);
}

// Box-Muller: two words, two values.
template <class A>
struct Gaussians {
  A v[2];
};
template <class A>
BLOKERN_INLINE Gaussians<A> gaussians(uint32_t first, uint32_t second) {
  const A radius = std::sqrt(A(-2) * std::log(uniform<A>(first)));
  const auto [cosine, sine] = cos_sin_of_turn(uniform<A>(second));
  return {{radius * cosine, radius * sine}};
}

template <class A>
BLOKERN_INLINE A exponential(uint32_t word) {
  return -std::log(uniform<A>(word));
}
template <class A>
BLOKERN_INLINE A signed_exponential(uint32_t word) {
  return (word & 1u) != 0 ? -exponential<A>(word) : exponential<A>(word);
}

// The radius of a uniform point of the unit ball in `size` dimensions.
BLOKERN_INLINE double radius_draw(uint32_t word, int64_t size) {
  return std::pow(uniform<double>(word), 1.0 / static_cast<double>(size));
}

// CPU kernels; [begin, end) counts samples.
template <class T>
void random_start_linf(const RandomStart<T>& p, int64_t begin, int64_t end);
template <class T>
void random_start_l2(const RandomStart<T>& p, int64_t begin, int64_t end);
template <class T>
void random_start_l1(const RandomStart<T>& p, int64_t begin, int64_t end);

// CUDA kernels: the whole batch, queued on the call's stream.
template <class T>
void random_start_linf(const RandomStart<T>& p, const CudaCall& call);
template <class T>
void random_start_l2(const RandomStart<T>& p, const CudaCall& call);
template <class T>
void random_start_l1(const RandomStart<T>& p, const CudaCall& call);

}  // namespace blokern

// fast_bat_step: δ* = P_C(z − step_size · grad), C = {‖δ‖∞ ≤ eps, clip_min ≤ x + δ ≤ clip_max}, and
// H_C's diagonal: true where neither constraint is active, decided on the unclamped value (Zhang et
// al., ICML 2022).
#pragma once

#include <cstdint>

#include "attack/ball.h"
#include "attack/batch.h"
#include "support/cuda/call.h"

namespace blokern {

template <class T, class G>
struct FastBatStep {
  using Image = T;
  Batch batch;
  Rows<const T> z, x;
  Rows<const G> grad;
  Rows<T> delta;
  Rows<bool> free;
  PerSample step_size, eps;
  Box clip;
};

// The step's outcome: δ, and the bounds between which u was free.
template <class V>
struct FastBatDelta {
  V u, lower, upper, delta;
};

// eps: a T, for a half type; then so are the bounds (ball.h).
template <class T, class V>
BLOKERN_INLINE FastBatDelta<V> fast_bat_delta(V z, V x, V grad, V step_size, V eps, V lo, V hi) {
  const V u = z - step_size * grad;
  const V to_lo = sum_above<T>(lo, -x), to_hi = sum_below<T>(hi, -x) + V(0);
  const V delta = clamp(clamp(u, -eps, eps), to_lo, to_hi);
  return {u, larger(-eps, to_lo), -larger(-eps, -to_hi), delta};
}

// CPU kernel; [begin, end) counts elements of the whole batch.
template <class T, class G>
void fast_bat_step(const FastBatStep<T, G>& p, int64_t begin, int64_t end);

// CUDA kernel: the whole batch, queued on the call's stream.
template <class T, class G>
void fast_bat_step(const FastBatStep<T, G>& p, const CudaCall& call);

}  // namespace blokern

// The projections onto {‖δ‖ ≤ eps} and the image box, an element at a time: scalar on host and device, lanes
// on the CPU. A sample's sums (norms, the L1 threshold) are the kernels' business.
#pragma once

#include "support/math.h"

namespace blokern {

// L∞: to the ball, then to the box. The box wins where the two do not meet.
template <class V>
BLOKERN_INLINE V linf_project(V x_adv, V x, V eps, V lo, V hi) {
  return clamp(clamp(x_adv, x - eps, x + eps), lo, hi);
}

// L2, with scale = min(1, eps / ‖δ‖): to the ball, then to the box.
template <class V>
BLOKERN_INLINE V scale_and_clip(V delta, V x, V scale, V lo, V hi) {
  return clamp(x + scale * delta, lo, hi);
}

// L1 and box together, the Euclidean projection: soft-threshold δ by the sample's τ, then to the box.
template <class V>
BLOKERN_INLINE V l1_project(V delta, V x, V tau, V lo, V hi) {
  return clamp(x + sign(delta) * larger(absolute(delta) - tau, V(0)), lo, hi);
}

// τ is the root of Σ|projected δ(τ)| = eps. Each |projected δ| is floor + clamp(size − τ, 0, cap):
// floor is what the box itself forces (zero for x inside it), cap how far above that the box lets it go.
template <class V>
struct L1Term {
  V floor, size, cap;
};

template <class V>
BLOKERN_INLINE L1Term<V> l1_term(V delta, V x, V lo, V hi) {
  const auto negative = less(delta, V(0));  // mirrored, so that δ ≥ 0 lies in [lower, upper]
  const V lower = where(negative, x - hi, lo - x);
  const V upper = where(negative, x - lo, hi - x);
  const V floor = larger(larger(lower, -upper), V(0));
  return {floor, absolute(delta) - floor, larger(upper - floor, V(0))};
}

}  // namespace blokern

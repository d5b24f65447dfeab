// apgd_step: one step of Auto-PGD with momentum m (Croce & Hein, ICML 2020):
//   z = P(x_adv + step_size · direction);   x_adv ← P(x_adv + m (z − x_adv) + (1 − m)(x_adv − x_prev)).
// For L1 the direction is the signs of a sample's largest |grad|, over their number (Croce &
// Hein, ICML 2021).
#pragma once

#include <cstdint>

#include "attack/ball.h"
#include "attack/batch.h"
#include "support/cuda/call.h"

namespace blokern {

template <class T, class G>
struct ApgdStep {
  using Image = T;
  Batch batch;
  Rows<T> x_adv, x_prev;  // both are written: x_prev takes the old x_adv
  Rows<const T> x;
  Rows<const G> grad;
  PerSample step_size, eps;
  double momentum;      // 1: no momentum, one projection
  const int64_t* keep;  // L1 only: [samples], the number of gradient entries to follow, or null: all
  Box clip;
};

template <class V>
BLOKERN_INLINE V with_momentum(V z, V x_adv, V x_prev, V momentum) {
  return x_adv + momentum * (z - x_adv) + (V(1) - momentum) * (x_adv - x_prev);
}

// The direction of L1: the signs of the entries that are large enough to be followed.
template <class V>
BLOKERN_INLINE V followed_sign(V grad, V threshold) {
  return where(less(absolute(grad), threshold), V(0), sign(grad));
}

// CPU kernels. L∞ is elementwise: [begin, end) counts elements of the whole batch; elsewhere
// it counts samples.
template <class T, class G>
void apgd_step_linf(const ApgdStep<T, G>& p, int64_t begin, int64_t end);
template <class T, class G>
void apgd_step_l2(const ApgdStep<T, G>& p, int64_t begin, int64_t end);
template <class T, class G>
void apgd_step_l1(const ApgdStep<T, G>& p, int64_t begin, int64_t end);

// CUDA kernels: the whole batch, queued on the call's stream.
template <class T, class G>
void apgd_step_linf(const ApgdStep<T, G>& p, const CudaCall& call);
template <class T, class G>
void apgd_step_l2(const ApgdStep<T, G>& p, const CudaCall& call);
template <class T, class G>
void apgd_step_l1(const ApgdStep<T, G>& p, const CudaCall& call);

}  // namespace blokern

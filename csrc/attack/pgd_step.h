// pgd_step: x_adv ← P(x_adv + step_size · direction(grad)), direction = sign, g/‖g‖₂ or g/‖g‖₁ (zero where
// the norm is zero). Madry et al., ICLR 2018, and its L2 and L1 forms.
#pragma once

#include <cstdint>

#include "attack/ball.h"
#include "attack/batch.h"
#include "support/cuda/call.h"

namespace blokern {

template <class T, class G>
struct PgdStep {
  using Image = T;
  Batch batch;
  Rows<const T> x_adv, x;
  Rows<const G> grad;
  Rows<T> out;  // may be x_adv
  PerSample step_size, eps;
  Box clip;
};

template <class T, class V>
BLOKERN_INLINE V linf_step(V x_adv, V x, V grad, V step_size, V eps, V lo, V hi) {
  return linf_project<T>(x_adv + step_size * sign(grad), x, eps, lo, hi);
}

// An L2 step's length and outcome, from a sample's Σg², Σδ² and Σδg before it: one reduction serves the
// direction's norm and the projection's.
struct L2Step {
  double scale;    // δ moves by scale · g
  double squared;  // ‖δ + scale · g‖²
  bool trusted;    // false where the terms cancel, or a sum left the range of the type that it is formed in
};

template <class A>
BLOKERN_INLINE L2Step l2_step(double gg, double dd, double dg, double step_size) {
  const double scale = step_size / std::sqrt(gg);
  const double squared = dd + 2 * scale * dg + scale * scale * gg;
  return {scale, squared, is_safe_norm<A>(gg) && !(squared < 0.01 * (dd + scale * scale * gg))};
}

// CPU kernels. L∞ is elementwise: [begin, end) counts elements of the whole batch; elsewhere
// it counts samples.
template <class T, class G>
void pgd_step_linf(const PgdStep<T, G>& p, int64_t begin, int64_t end);
template <class T, class G>
void pgd_step_l2(const PgdStep<T, G>& p, int64_t begin, int64_t end);
template <class T, class G>
void pgd_step_l1(const PgdStep<T, G>& p, int64_t begin, int64_t end);

// CUDA kernels: the whole batch, queued on the call's stream.
template <class T, class G>
void pgd_step_linf(const PgdStep<T, G>& p, const CudaCall& call);
template <class T, class G>
void pgd_step_l2(const PgdStep<T, G>& p, const CudaCall& call);
template <class T, class G>
void pgd_step_l1(const PgdStep<T, G>& p, const CudaCall& call);

}  // namespace blokern

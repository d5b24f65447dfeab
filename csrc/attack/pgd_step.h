// pgd_step: x_adv ← P(x_adv + step_size · direction(grad)), direction = sign, g/‖g‖₂ or g/‖g‖₁ (zero where
// the norm is zero). Madry et al., ICLR 2018, eq. 4, and its L2 and L1 forms.
#pragma once

#include <cstdint>

#include "attack/ball.h"
#include "attack/batch.h"

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

template <class V>
BLOKERN_INLINE V linf_step(V x_adv, V x, V grad, V step_size, V eps, V lo, V hi) {
  return linf_project(x_adv + step_size * sign(grad), x, eps, lo, hi);
}

// CPU kernels. L∞ is elementwise: [begin, end) counts elements of the whole batch; elsewhere it counts
// samples.
template <class T, class G>
void pgd_step_linf(const PgdStep<T, G>& p, int64_t begin, int64_t end);
template <class T, class G>
void pgd_step_l2(const PgdStep<T, G>& p, int64_t begin, int64_t end);
template <class T, class G>
void pgd_step_l1(const PgdStep<T, G>& p, int64_t begin, int64_t end);

}  // namespace blokern

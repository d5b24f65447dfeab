// fast_bat_step on CUDA. Threads: a thread four packs, a pack the 128 bits of neighbouring elements, on
// the boundaries of `delta`. No shared memory. The CPU's bits. Three tensors are read, one and a byte
// an element written.
#pragma once

#include "attack/fast_bat_step.h"
#include "attack/rows_cuda.cuh"

namespace blokern {

struct FastBatStepRow {
  static constexpr int kSlots = 0;

  template <class T, class G>
  static BLOKERN_DEVICE void row(const FastBatStep<T, G>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    const T* const z = p.z[n];
    const T* const x = p.x[n];
    const G* const grad = p.grad[n];
    T* const delta = p.delta[n];
    bool* const free = p.free[n];
    const A step_size = static_cast<A>(p.step_size[n]), eps = sum_below<T>(A(0), radius_in<T>(p.eps[n]));
    const Limits<A> box(p.clip);
    const auto walk = team.walk<kPackSize<T, G>>(p.batch.size, misalignment(delta));
    walk.sweep([=](int64_t i, auto part) {
      const auto at = load<A>(z + i, part), original = load<A>(x + i, part), g = load<A>(grad + i, part);
      Pack<A, part.size> deltas;
      Pack<bool, part.size> is_free;
#pragma unroll
      for (int k = 0; k < part.size; ++k) {
        const auto step = fast_bat_delta<T>(at[k], original[k], g[k], step_size, eps, box.lo, box.hi);
        deltas[k] = step.delta;
        is_free[k] = less(step.lower, step.u) && less(step.u, step.upper);
      }
      store(delta + i, deltas, part);
      store(free + i, is_free, part);
    });
  }
};

}  // namespace blokern

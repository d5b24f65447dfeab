// project on CUDA. Threads, shared memory and numerics as in pgd_step_cuda.cuh, without the step: two tensors
// are read, one is written.
#pragma once

#include "attack/project.h"
#include "attack/rows_cuda.cuh"

namespace blokern {

struct ProjectLinf {
  static constexpr int kSlots = 0;

  template <class T>
  static BLOKERN_DEVICE void row(const Project<T>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    const T* const x_adv = p.x_adv[n];
    const T* const x = p.x[n];
    T* const out = p.out[n];
    const auto walk = team.walk<kPackSize<T>>(p.batch.size, misalignment(out));
    if (p.batch.skips(n)) return copy_row<A>(walk, x_adv, out);
    const A eps = radius_in<T>(p.eps[n]);
    const Limits<A> box(p.clip);
    walk.sweep([=](int64_t i, auto part) {
      const auto current = load<A>(x_adv + i, part), original = load<A>(x + i, part);
      store(
          out + i,
          each<A>(part, [&](int k) { return linf_project<T>(current[k], original[k], eps, box.lo, box.hi); }),
          part);
    });
  }
};

template <class Norm>
struct ProjectRow {
  static constexpr int kSlots = 4;

  template <class T>
  static BLOKERN_DEVICE void row(const Project<T>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    const T* const x_adv = p.x_adv[n];
    const T* const x = p.x[n];
    const auto walk = team.walk<kPackSize<T>>(p.batch.size, misalignment(p.out[n]));
    if (p.batch.skips(n)) return copy_row<A>(walk, x_adv, p.out[n]);
    const auto delta = [=](int64_t i, auto part) {
      const auto current = load<A>(x_adv + i, part), original = load<A>(x + i, part);
      return each<A>(part, [&](int k) { return current[k] - original[k]; });
    };
    finish_row<A>(walk, x, p.out[n], delta, Norm::template fit<T>(team, walk, x, p.eps[n], p.clip, delta));
  }
};

}  // namespace blokern

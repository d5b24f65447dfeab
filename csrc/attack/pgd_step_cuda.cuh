// pgd_step on CUDA.
// Threads: L∞, a thread four packs, a pack the 128 bits of neighbouring elements, on the boundaries of `out`.
// L2
//   and L1, a team of blocks a sample (support/cuda/team.cuh), its threads in turns over the packs.
// Shared memory: the warps' sums, 64 bytes each of up to three.
// Numerics: L∞ has the CPU's bits; L2 and L1 its formulas, and sums in another order.
// Memory: L∞ and L2 read three tensors and write one; L2 reads them twice, the second time from cache. L1
// reads
//   them once for the direction, and once for each step of the search for τ.
#pragma once

#include "attack/pgd_step.h"
#include "attack/rows_cuda.cuh"

namespace blokern {

struct PgdStepLinf {
  static constexpr int kSlots = 0;

  template <class T, class G>
  static BLOKERN_DEVICE void row(const PgdStep<T, G>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    const T* const x_adv = p.x_adv[n];
    T* const out = p.out[n];
    const auto walk = team.walk<kPackSize<T, G>>(p.batch.size, misalignment(out));
    if (p.batch.skips(n)) return copy_row<A>(walk, x_adv, out);
    const A step_size = static_cast<A>(p.step_size[n]), eps = radius_in<T>(p.eps[n]);
    const Limits<A> box(p.clip);
    const auto next = delta_of<A>(x_adv, p.x[n], p.grad[n], [=](A current, A original, A grad) {
      return linf_step<T>(current, original, grad, step_size, eps, box.lo, box.hi);
    });
    walk.sweep([=](int64_t i, auto part) { store(out + i, next(i, part), part); });
  }
};

struct PgdStepL2 {
  static constexpr int kSlots = 3;

  template <class T, class G>
  static BLOKERN_DEVICE void row(const PgdStep<T, G>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    const T* const x_adv = p.x_adv[n];
    const T* const x = p.x[n];
    const G* const grad = p.grad[n];
    const auto walk = team.walk<kPackSize<T, G>>(p.batch.size, misalignment(p.out[n]));
    if (p.batch.skips(n)) return copy_row<A>(walk, x_adv, p.out[n]);
    const auto terms = [=](int64_t i, auto part) {
      const auto current = load<A>(x_adv + i, part), original = load<A>(x + i, part),
                 g = load<A>(grad + i, part);
      return [=](int k, A* s) {
        const A d = current[k] - original[k];
        s[0] += g[k] * g[k];
        s[1] += d * d;
        s[2] += d * g[k];
      };
    };
    const auto [gg, dd, dg] = team.sums<A, 3>(walk, terms).v;
    const L2Step sum = l2_step<A>(gg, dd, dg, p.step_size[n]);
    const auto gradient = [=](int64_t i, auto part) { return load<A>(grad + i, part); };
    const NormedStep<A> step(sum.trusted ? ScaledNorm{1, std::sqrt(gg)} : norm_of<2, A>(team, walk, gradient),
                             p.step_size[n]);
    const auto delta = delta_of<A>(x_adv, x, grad, step);
    const ScaledNorm norm =
        sum.trusted ? ScaledNorm{1, std::sqrt(sum.squared)} : norm_of<2, A>(team, walk, delta);
    const A shrink = static_cast<A>(shrink_to(p.eps[n], norm.scale * norm.norm));
    finish_row<A>(walk, x, p.out[n], delta, L2Projection<T>{shrink, Limits<A>(p.clip)});
  }
};

struct PgdStepL1 {
  static constexpr int kSlots = 4;

  template <class T, class G>
  static BLOKERN_DEVICE void row(const PgdStep<T, G>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    const G* const grad = p.grad[n];
    const auto walk = team.walk<kPackSize<T, G>>(p.batch.size, misalignment(p.out[n]));
    if (p.batch.skips(n)) return copy_row<A>(walk, static_cast<const T*>(p.x_adv[n]), p.out[n]);
    const auto gradient = [=](int64_t i, auto part) { return load<A>(grad + i, part); };
    const NormedStep<A> step(norm_of<1, A>(team, walk, gradient), p.step_size[n]);
    const auto delta = delta_of<A>(static_cast<const T*>(p.x_adv[n]), p.x[n], grad, step);
    finish_row<A>(walk, p.x[n], p.out[n], delta, L1::fit<T>(team, walk, p.x[n], p.eps[n], p.clip, delta));
  }
};

}  // namespace blokern

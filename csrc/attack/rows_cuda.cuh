// What the attack family's CUDA kernels do to one sample, which a team of blocks walks. δ is never stored:
// each pass forms it anew from the inputs, which lie in cache by then, as delta(i, part), a pack of it.
#pragma once

#include <cstdint>

#include "attack/ball.h"
#include "attack/batch.h"
#include "support/cuda/pack.cuh"
#include "support/cuda/team.cuh"

namespace blokern {

// Blocks that a multiprocessor holds at least: a bound of 128 registers, without which ptxas spills a few to
// hold one block more.
constexpr int kResident = 2;

// Every kernel of the family: Op::row(p, n, team) for each sample n.
template <class Op, class P>
__global__ void __launch_bounds__(kTeamThreads, kResident) over_rows(P p, Teams teams) {
  Team team(teams);
  for (int64_t n = team.index(); n < p.batch.samples; n += team.count()) Op::row(p, n, team);
}

template <class Op, template <class...> class P, class... Ts>
void launch_rows(const P<Ts...>& p, const CudaCall& call) {
  // A sample's tensors: the images, where they came from, the gradient, the result.
  constexpr int64_t bytes = 4 * sizeof(typename P<Ts...>::Image);
  launch_teams(over_rows<Op, P<Ts...>>, p, p.batch.samples, p.batch.size, kPackSize<Ts...>,
               p.batch.size * bytes, Op::kSlots, call);
}

// An interval, in the type of the arithmetic.
template <class A>
struct Limits {
  A lo, hi;
  BLOKERN_DEVICE explicit Limits(Box box) : lo(static_cast<A>(box.min)), hi(static_cast<A>(box.max)) {}
};

template <class A, int kSize, class T>
BLOKERN_DEVICE void copy_row(const Walk<kSize>& walk, const T* from, T* to) {
  if (from == to) return;
  walk.sweep([=](int64_t i, auto part) { store(to + i, load<A>(from + i, part), part); });
}

// ‖values‖_P, of entries of any magnitude: scale is 1 where their sum lost nothing, else their largest.
template <int P, class A, int kSize, class Values>
BLOKERN_DEVICE ScaledNorm norm_of(Team& team, const Walk<kSize>& walk, Values values) {
  const Combine<0> largest;
  double scale = 1;
  while (true) {
    const A divisor = static_cast<A>(scale);
    const auto terms = [&](int64_t i, auto part) {
      return [=, v = values(i, part)](int k, A* s) {
        const A magnitude = absolute(v[k]);
        const A scaled = divisor == 1 ? magnitude : magnitude / divisor;
        s[0] += P == 2 ? scaled * scaled : scaled;
        s[1] = largest(1, s[1], magnitude);
      };
    };
    const auto [total, top] = team.sums<A, 2, 1>(walk, terms).v;
    if (scale != 1 || is_safe_norm<A>(total) || top == 0 || top == 1) {
      return {scale, P == 2 ? std::sqrt(total) : total};
    }
    scale = top;
  }
}

// δ after a step along grad / ‖grad‖.
template <class A>
struct NormedStep {
  ScaledNorm norm;
  double step_size;
  A scale;  // step_size / ‖grad‖, where the norm's own scale is 1

  BLOKERN_DEVICE NormedStep(ScaledNorm norm, double step_size)
      : norm(norm),
        step_size(step_size),
        scale(norm.norm == 0 ? A(0) : static_cast<A>(step_size / norm.norm)) {}

  BLOKERN_DEVICE A operator()(A x_adv, A x, A grad) const {
    if (norm.scale == 1) return (x_adv - x) + scale * grad;
    return scaled_step<A>(static_cast<double>(x_adv), static_cast<double>(x), static_cast<double>(grad),
                          step_size, norm);
  }
};

// δ as the passes form it: step(x_adv, x, grad), an element at a time.
template <class A, class T, class G, class Step>
BLOKERN_DEVICE auto delta_of(const T* x_adv, const T* x, const G* grad, Step step) {
  return [=](int64_t i, auto part) {
    const auto current = load<A>(x_adv + i, part), original = load<A>(x + i, part),
               g = load<A>(grad + i, part);
    return each<A>(part, [&](int k) { return step(current[k], original[k], g[k]); });
  };
}

// ---- The projections: what a sample's sums make of eps, then an element at a time, to be stored as a T.

template <class T, class A = Accum<T>>
struct L2Projection {
  A shrink;
  Limits<A> box;
  BLOKERN_DEVICE A operator()(A delta, A x) const {
    return scale_and_clip<T>(delta, x, shrink, box.lo, box.hi);
  }
};

template <class T, class A = Accum<T>>
struct L1Projection {
  A tau;
  Limits<A> box;
  BLOKERN_DEVICE A operator()(A delta, A x) const { return l1_project<T>(delta, x, tau, box.lo, box.hi); }
};

struct L2 {
  template <class T, class X, int kSize, class Delta>
  static BLOKERN_DEVICE L2Projection<T> fit(Team& team, const Walk<kSize>& walk, const X*, double eps,
                                            Box clip, Delta delta) {
    using A = Accum<T>;
    const ScaledNorm norm = norm_of<2, A>(team, walk, delta);
    return {static_cast<A>(shrink_to(eps, norm.scale * norm.norm)), Limits<A>(clip)};
  }
};

struct L1 {
  template <class T, class X, int kSize, class Delta>
  static BLOKERN_DEVICE L1Projection<T> fit(Team& team, const Walk<kSize>& walk, const X* x, double eps,
                                            Box clip, Delta delta) {
    using A = Accum<T>;
    const Limits<A> box(clip);
    const Combine<0> largest;
    L1Root<A> root(0, 0);
    for (bool is_first = true;; is_first = false) {
      const A tau = root.tau();
      const auto terms = [&](int64_t i, auto part) {
        return [=, d = delta(i, part), original = load<A>(x + i, part)](int k, A* s) {
          const auto term = l1_term(d[k], original[k], box.lo, box.hi);
          const A over = term.size - tau;
          s[0] += clamp(over, A(0), term.cap);
          s[1] += A(0) < over && over < term.cap ? A(1) : A(0);
          s[2] += term.floor;
          s[3] = largest(3, s[3], larger(A(0), term.size));
        };
      };
      const auto [value, slope, floors, top] = team.sums<A, 4, 3>(walk, terms).v;
      if (is_first) {
        const double radius = eps - floors;
        if (!(value > radius)) return {A(0), box};
        constexpr A infinity = std::numeric_limits<A>::infinity();
        if (!(radius > 0)) return {infinity, box};  // no radius left: every δ goes to what the box forces
        root = L1Root<A>(radius, top);
      }
      if (!root.improve(value, slope)) return {root.tau(), box};
    }
  }
};

// out ← the projection of x + δ.
template <class A, class T, int kSize, class Delta, class Projection>
BLOKERN_DEVICE void finish_row(const Walk<kSize>& walk, const T* x, T* out, Delta delta,
                               Projection projection) {
  walk.sweep([&](int64_t i, auto part) {
    const auto d = delta(i, part), original = load<A>(x + i, part);
    store(out + i, each<A>(part, [&](int k) { return projection(d[k], original[k]); }), part);
  });
}

}  // namespace blokern

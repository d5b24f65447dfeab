// layer_norm_tangent and layer_norm_adjoint_tangent on CUDA.
// Threads: a warp a row of up to 256 packs (1024 float32 elements), else a team of blocks
//   (support/cuda/team.cuh), in turns over the packs from the row's first element on, so that in every row a
//   thread has the same columns. Packs of rows that 16 bytes do not divide are accessed by elements.
// Shared memory: the warps' sums, 128 and 448 bytes.
// Numerics: a row's sums in double, packs in the accumulation type. A team adds up the weights' adjoints of
//   its rows in their order; the caller adds the teams'.
// Memory: the tensors are read once for the sums, and again from cache, where the sums of the weights'
//   adjoints also stay.
#pragma once

#include "curvature/layer_norm.h"
#include "curvature/rows_cuda.cuh"

namespace blokern {

// Of a weight that may be missing.
template <class A, int kSize>
BLOKERN_DEVICE Pack<A, kSize> weights_or(A otherwise, const A* weight, int64_t i, Part<kSize> part) {
  if (weight != nullptr) return load<A>(weight + i, part);
  return each<A>(part, [=](int) { return otherwise; });
}

template <class A>
BLOKERN_DEVICE const A* of_kind(const A* weight, int64_t offset) {
  return weight != nullptr ? weight + offset : nullptr;
}

// Factors in the type of the arithmetic.
template <class A>
struct NarrowFactors {
  A first, x, constant;
  BLOKERN_DEVICE explicit NarrowFactors(const TangentFactors& f)
      : first(static_cast<A>(f.x_dot)), x(static_cast<A>(f.x)), constant(static_cast<A>(f.constant)) {}
  BLOKERN_DEVICE explicit NarrowFactors(const AdjointFactors& f)
      : first(static_cast<A>(f.grad)), x(static_cast<A>(f.x)), constant(static_cast<A>(f.constant)) {}
  BLOKERN_DEVICE A operator()(A by_first, A centred) const {
    return first * by_first + x * centred + constant;
  }
};

struct LayerNormTangentRow {
  static constexpr int kSlots = 2;

  template <class T>
  static BLOKERN_INLINE int64_t rows(const LayerNormTangent<T>& p) {
    return p.at.rows;
  }

  template <class T, class Team>
  static BLOKERN_DEVICE void row(const LayerNormTangent<T>& p, int64_t row, Team& team) {
    using A = Accum<T>;
    const NormRows<T>& at = p.at;
    const int64_t start = row * at.size, kind = row % at.kinds * at.size;
    const T *const x = at.x + start, *const x_dot = p.x_dot + start;
    T* const y_dot = p.y_dot + start;
    const A *const weight = of_kind(at.weight, kind), *const weight_dot = of_kind(at.weight_dot, kind);
    const A* const bias_dot = of_kind(at.bias_dot, kind);
    const double r = at.rstd[row], n = static_cast<double>(at.size);
    const A mu = static_cast<A>(at.mean[row]), rstd = static_cast<A>(r);
    const auto walk = team.template walk<kPackSize<T>>(at.size, 0);
    const auto [level, along] =
        team.template sums<A, 2>(walk,
                                 [=](int64_t i, auto part) {
                                   return [v = load<A>(x_dot + i, part), u = load<A>(x + i, part), mu](int k,
                                                                                                       A* s) {
                                     s[0] += v[k];
                                     s[1] += v[k] * (u[k] - mu);
                                   };
                                 })
            .v;
    const NarrowFactors<A> moved(tangent_factors(r, 1, 0, 0, {level / n, along / n}));
    walk.sweep([=](int64_t i, auto part) {
      const auto v = load<A>(x_dot + i, part), u = load<A>(x + i, part);
      const auto gamma = weights_or(A(1), weight, i, part), gamma_dot = weights_or(A(0), weight_dot, i, part);
      const auto beta_dot = weights_or(A(0), bias_dot, i, part);
      store(y_dot + i,
            each<A>(part,
                    [&](int k) {
                      const A centred = u[k] - mu;
                      return gamma[k] * moved(v[k], centred) + gamma_dot[k] * (rstd * centred) + beta_dot[k];
                    }),
            part);
    });
  }
};

// A team has every (blocks · kinds)-th row, all of one kind, and a place of its own for
// the weights' adjoints.
struct LayerNormAdjointTangentRow {
  static constexpr int kSlots = 7;

  template <class T>
  static BLOKERN_INLINE int64_t rows(const LayerNormAdjointTangent<T>& p) {
    return p.blocks * p.at.kinds;
  }

  template <class T, class Team>
  static BLOKERN_DEVICE void row(const LayerNormAdjointTangent<T>& p, int64_t first, Team& team) {
    for (int64_t row = first; row < p.at.rows; row += rows(p)) one(p, row, first, team);
  }

 private:
  template <class T, class Team>
  static BLOKERN_DEVICE void one(const LayerNormAdjointTangent<T>& p, int64_t row, int64_t place,
                                 Team& team) {
    using A = Accum<T>;
    const NormRows<T>& at = p.at;
    const int64_t start = row * at.size, kind = row % at.kinds * at.size;
    const T *const x = at.x + start, *const x_dot = p.x_dot + start;
    const T *const grad = p.grad + start, *const grad_dot = p.grad_dot + start;
    T* const x_bar = p.x_bar != nullptr ? p.x_bar + start : nullptr;
    T* const x_bar_dot = p.x_bar_dot + start;
    const A *const weight = of_kind(at.weight, kind), *const weight_dot = of_kind(at.weight_dot, kind);
    A* const weight_bar = p.weight_bar_dot + place * at.size;
    A* const bias_bar = p.bias_bar_dot + place * at.size;
    const double r = at.rstd[row], n = static_cast<double>(at.size);
    const A mu = static_cast<A>(at.mean[row]), rstd = static_cast<A>(r);
    const auto walk = team.template walk<kPackSize<T>>(at.size, 0);
    const auto total = team.template sums<A, 7>(walk, [=](int64_t i, auto part) {
      const auto u = load<A>(x + i, part), v = load<A>(x_dot + i, part);
      const auto g = load<A>(grad + i, part), g_dot = load<A>(grad_dot + i, part);
      const auto gamma = weights_or(A(1), weight, i, part), gamma_dot = weights_or(A(0), weight_dot, i, part);
      return [=](int k, A* s) {
        const A centred = u[k] - mu, h = gamma[k] * g[k], h_dot = gamma[k] * g_dot[k] + gamma_dot[k] * g[k];
        s[0] += v[k];
        s[1] += v[k] * centred;
        s[2] += h;
        s[3] += h * centred;
        s[4] += h_dot;
        s[5] += h_dot * centred;
        s[6] += h * v[k];
      };
    });
    const TangentMeans t{total.v[0] / n, total.v[1] / n};
    const AdjointMeans a{total.v[2] / n, total.v[3] / n};
    const auto f = adjoint_tangent_factors(r, 1, 0, t, a, {total.v[4] / n, total.v[5] / n, total.v[6] / n});
    const NarrowFactors<A> own(adjoint_factors(r, 1, a)), moved(tangent_factors(r, 1, 0, 0, t));
    const A by_h_dot = static_cast<A>(f.grad_dot), by_h = static_cast<A>(f.grad);
    const A by_x_dot = static_cast<A>(f.x_dot), by_x = static_cast<A>(f.x);
    const A constant = static_cast<A>(f.constant);
    walk.sweep([=](int64_t i, auto part) {
      const auto u = load<A>(x + i, part), v = load<A>(x_dot + i, part);
      const auto g = load<A>(grad + i, part), g_dot = load<A>(grad_dot + i, part);
      const auto gamma = weights_or(A(1), weight, i, part), gamma_dot = weights_or(A(0), weight_dot, i, part);
      auto weight_sum = load<A>(weight_bar + i, part), bias_sum = load<A>(bias_bar + i, part);
      Pack<A, part.size> bars, bars_dot;
#pragma unroll
      for (int k = 0; k < part.size; ++k) {
        const A centred = u[k] - mu, h = gamma[k] * g[k], h_dot = gamma[k] * g_dot[k] + gamma_dot[k] * g[k];
        bars_dot[k] = by_h_dot * h_dot + by_h * h + by_x_dot * v[k] + by_x * centred + constant;
        bars[k] = own(h, centred);
        weight_sum[k] = weight_sum[k] + g_dot[k] * (rstd * centred) + g[k] * moved(v[k], centred);
        bias_sum[k] = bias_sum[k] + g_dot[k];
      }
      store(x_bar_dot + i, bars_dot, part);
      if (x_bar != nullptr) store(x_bar + i, bars, part);
      store(weight_bar + i, weight_sum, part);
      store(bias_bar + i, bias_sum, part);
    });
  }
};

}  // namespace blokern

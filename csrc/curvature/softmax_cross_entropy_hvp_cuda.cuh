// softmax_cross_entropy_hvp on CUDA.
// Threads: a warp a row of up to 256 packs (1024 float32 classes), else a team of blocks
//   (support/cuda/team.cuh), in turns over the packs, on the boundaries of `grad`.
// Shared memory: the warps' sums, 320 bytes.
// Numerics: the largest logit and the sums relative to it are found in one pass: a thread whose largest grows
//   shrinks what it has, and threads are merged in a fixed tree.
// Memory: logits and tangent (and soft targets) are read once, and again from cache; grad and hvp are
// written.
#pragma once

#include <cmath>
#include <limits>

#include "curvature/rows_cuda.cuh"
#include "curvature/softmax_cross_entropy_hvp.h"

namespace blokern {

// What is summed of a row: the largest logit, Σ e and Σ e ż with e relative to it, Q, and Σ q z.
using RowSums = Sums<5>;

template <class A>
struct MergeRowSums {
  BLOKERN_DEVICE RowSums operator()(const RowSums& a, const RowSums& b) const {
    RowSums both{{a.v[0], a.v[1], a.v[2], a.v[3] + b.v[3], a.v[4] + b.v[4]}};
    if (b.v[1] == 0) return both;  // nothing there, or logits of −∞ alone
    if (a.v[1] == 0) {
      for (int k = 0; k < 3; ++k) both.v[k] = b.v[k];
      return both;
    }
    const double top = larger(a.v[0], b.v[0]);
    const double of_a = exponential(static_cast<A>(a.v[0] - top)),
                 of_b = exponential(static_cast<A>(b.v[0] - top));
    both.v[0] = top;
    for (int k = 1; k < 3; ++k) both.v[k] = a.v[k] * of_a + b.v[k] * of_b;
    return both;
  }
};

// What a thread has of a row's exponentials so far.
template <class A>
struct OnlineExps {
  A top = -std::numeric_limits<A>::infinity();
  double exps = 0, along = 0;

  template <int kSize>
  BLOKERN_DEVICE void add(const Pack<A, kSize>& z, const Pack<A, kSize>& v, Part<kSize> part) {
    A larger_top = top;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (part.has(k)) larger_top = larger(larger_top, z[k]);
    }
    if (larger_top != top) {
      const double shrink = exponential(top - larger_top);
      exps *= shrink;
      along *= shrink;
      top = larger_top;
    }
    // −∞ less −∞ would be NaN, where a thread has seen nothing else.
    const A shift = top == -std::numeric_limits<A>::infinity() ? A(0) : top;
    A sum = 0, sum_along = 0;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const A e = part.has(k) ? exponential(z[k] - shift) : A(0);
      sum += e;
      sum_along += e * v[k];
    }
    exps += sum;
    along += sum_along;
  }
};

struct SoftmaxCrossEntropyRow {
  static constexpr int kSlots = 5;

  template <class T>
  static BLOKERN_INLINE int64_t rows(const SoftmaxCrossEntropyHvp<T>& p) {
    return p.rows;
  }

  template <class T, class Team>
  static BLOKERN_DEVICE void row(const SoftmaxCrossEntropyHvp<T>& p, int64_t n, Team& team) {
    using A = Accum<T>;
    const int64_t start = n * p.classes;
    const T *const z = p.logits + start, *const v = p.tangent + start;
    const T* const target = p.target != nullptr ? p.target + start : nullptr;
    T *const grad = p.grad + start, *const hvp = p.hvp + start;
    const auto walk = team.template walk<kPackSize<T>>(p.classes, misalignment(grad));
    const double scale = p.scale();

    // The class whose q has a share of its own, none for soft targets.
    int64_t label = -1;
    double own = 0;
    if (target == nullptr) {
      label = p.labels[n];
      if (label == p.ignore_index) {
        walk.sweep([=](int64_t i, auto part) {
          const Pack<A, part.size> zero{};
          store(grad + i, zero, part);
          store(hvp + i, zero, part);
        });
        if (team.leads()) p.loss[n] = 0 * scale;
        return;
      }
      const bool known = label >= 0 && label < p.classes;
      own = known ? (1 - p.label_smoothing) * p.weight_of(label) : std::numeric_limits<double>::quiet_NaN();
      if (!known) label = 0;
    }

    const A* const weight = p.weight;
    const A kept = target != nullptr ? static_cast<A>(1 - p.label_smoothing) : A(0);
    const A floor = static_cast<A>(p.label_smoothing / static_cast<double>(p.classes));
    const bool spreads = target != nullptr || p.label_smoothing != 0;
    const auto spread = [=](int64_t i, auto part) {
      Pack<A, part.size> q{};
      if (!spreads) return q;
      if (target != nullptr) q = load<A>(target + i, part);
      Pack<A, part.size> w;
      if (weight != nullptr) w = load<A>(weight + i, part);
      return each<A>(part, [&](int k) {
        const A share = spread_weight(kept, q[k], floor);
        return weight != nullptr ? share * w[k] : share;
      });
    };

    OnlineExps<A> online;
    double total = 0, inner = 0;
    walk.sweep([&](int64_t i, auto part) {
      const auto logit = load<A>(z + i, part), tangent = load<A>(v + i, part), q = spread(i, part);
      online.add(logit, tangent, part);
      if (!spreads) return;  // zero times a masked class's −∞ would be NaN
      A pack_total = 0, pack_inner = 0;
#pragma unroll
      for (int k = 0; k < part.size; ++k) {
        if (!part.has(k)) continue;
        pack_total += q[k];
        pack_inner += q[k] * logit[k];
      }
      total += pack_total;
      inner += pack_inner;
    });
    const RowSums sums =
        team.reduce(RowSums{{online.top, online.exps, online.along, total, inner}}, MergeRowSums<A>{});
    const double exps = sums.v[1];
    total = sums.v[3] + own;
    inner = sums.v[4];
    if (label >= 0) inner += own * static_cast<double>(z[label]);
    if (team.leads()) p.loss[n] = (total * (std::log(exps) + sums.v[0]) - inner) * scale;

    const A top = static_cast<A>(sums.v[0]), inverse = static_cast<A>(1 / exps);
    const A mean = static_cast<A>(sums.v[2] / exps), own_weight = static_cast<A>(own);
    const A all = static_cast<A>(total), factor = static_cast<A>(scale);
    walk.sweep([=](int64_t i, auto part) {
      const auto logit = load<A>(z + i, part), tangent = load<A>(v + i, part), q = spread(i, part);
      Pack<A, part.size> grads, products;
#pragma unroll
      for (int k = 0; k < part.size; ++k) {
        const A probability = exponential(logit[k] - top) * inverse;
        const A target_weight = i + k == label ? q[k] + own_weight : q[k];
        grads[k] = cross_entropy_grad(probability, target_weight, all, factor);
        products[k] = cross_entropy_hvp(probability, tangent[k], mean, all, factor);
      }
      store(grad + i, grads, part);
      store(hvp + i, products, part);
    });
  }
};

struct LabelWeightsRow {
  static constexpr int kSlots = 1;

  struct Params {
    LabelWeights labels;
    double* total;
  };

  static BLOKERN_INLINE int64_t rows(const Params&) { return 1; }

  template <class Team>
  static BLOKERN_DEVICE void row(const Params& p, int64_t, Team& team) {
    const int64_t* const labels = p.labels.labels;
    const double* const weight = p.labels.weight;
    const int64_t ignored = p.labels.ignore_index, classes = p.labels.classes;
    const auto walk = team.template walk<kPackSize<int64_t>>(p.labels.rows, misalignment(labels));
    const double total = team.template sum<double>(walk, [=](int64_t i, auto part) {
      const auto label = load<int64_t>(labels + i, part);
      return each<double>(part, [&](int k) {
        const bool counts = part.has(k) && label[k] != ignored && label[k] >= 0 && label[k] < classes;
        return !counts ? 0.0 : weight != nullptr ? weight[label[k]] : 1.0;
      });
    });
    if (team.leads()) *p.total = total;
  }
};

}  // namespace blokern

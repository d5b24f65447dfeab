#include "curvature/layer_norm.h"

#include <algorithm>

#include "support/dtypes.h"
#include "support/vec.h"

namespace blokern {
namespace {

// Of a weight that may be missing.
template <class A, class Width>
BLOKERN_INLINE Lanes<A> or_one(const A* weight, int64_t i, Width w) {
  return weight != nullptr ? load<A>(weight + i, w) : Lanes<A>(A(1));
}
template <class A, class Width>
BLOKERN_INLINE Lanes<A> or_zero(const A* weight, int64_t i, Width w) {
  return weight != nullptr ? load<A>(weight + i, w) : Lanes<A>();
}

template <class A>
const A* of_kind(const A* weight, int64_t offset) {
  return weight != nullptr ? weight + offset : nullptr;
}

template <class A>
Lanes<A> lanes(double value) {
  return Lanes<A>(static_cast<A>(value));
}

template <class A, class T>
TangentMeans tangent_means(const T* x, const T* x_dot, double mean, int64_t size) {
  const Lanes<A> mu = lanes<A>(mean);
  const auto [level, along] = sums<A, 2>(size, [=](int64_t i, auto w, auto& s) {
    const Lanes<A> v = load<A>(x_dot + i, w);
    s[0] = s[0] + v;
    s[1] = s[1] + v * (load<A>(x + i, w) - mu);
  });
  return {level / static_cast<double>(size), along / static_cast<double>(size)};
}

template <class T>
void tangent_row(const LayerNormTangent<T>& p, int64_t row) {
  using A = Accum<T>;
  const NormRows<T>& at = p.at;
  const int64_t start = row * at.size, kind = row % at.kinds * at.size;
  const T *const x = at.x + start, *const x_dot = p.x_dot + start;
  T* const y_dot = p.y_dot + start;
  const A *const weight = of_kind(at.weight, kind), *const weight_dot = of_kind(at.weight_dot, kind);
  const A* const bias_dot = of_kind(at.bias_dot, kind);
  const double r = at.rstd[row];
  const auto f = tangent_factors(r, 1, 0, 0, tangent_means<A>(x, x_dot, at.mean[row], at.size));
  const Lanes<A> mu = lanes<A>(at.mean[row]), rstd = lanes<A>(r);
  const Lanes<A> by_x_dot = lanes<A>(f.x_dot), by_x = lanes<A>(f.x), constant = lanes<A>(f.constant);
  sweep<A>(0, at.size, [=](int64_t i, auto w) {
    const Lanes<A> centred = load<A>(x + i, w) - mu;
    const Lanes<A> normal_dot = by_x_dot * load<A>(x_dot + i, w) + by_x * centred + constant;
    const Lanes<A> by_weight = or_zero(weight_dot, i, w) * (rstd * centred);
    store(y_dot + i, or_one(weight, i, w) * normal_dot + by_weight + or_zero(bias_dot, i, w), w);
  });
}

template <bool kBoth, class T>
void adjoint_tangent_row(const LayerNormAdjointTangent<T>& p, int64_t row) {
  using A = Accum<T>;
  const NormRows<T>& at = p.at;
  const int64_t start = row * at.size, kind = row % at.kinds * at.size;
  const int64_t block = row / kNormBlock * at.kinds * at.size;
  const T *const x = at.x + start, *const x_dot = p.x_dot + start;
  const T *const grad = p.grad + start, *const grad_dot = p.grad_dot + start;
  T* const x_bar = kBoth ? p.x_bar + start : nullptr;
  T* const x_bar_dot = p.x_bar_dot + start;
  const A *const weight = of_kind(at.weight, kind), *const weight_dot = of_kind(at.weight_dot, kind);
  A* const weight_bar = p.weight_bar_dot + block + kind;
  A* const bias_bar = p.bias_bar_dot + block + kind;
  const double r = at.rstd[row], n = static_cast<double>(at.size);
  const Lanes<A> mu = lanes<A>(at.mean[row]), rstd = lanes<A>(r);

  const auto total = sums<A, 7>(at.size, [=](int64_t i, auto w, auto& s) {
    const Lanes<A> v = load<A>(x_dot + i, w), centred = load<A>(x + i, w) - mu;
    const Lanes<A> g = load<A>(grad + i, w), gamma = or_one(weight, i, w);
    const Lanes<A> h = gamma * g;
    const Lanes<A> h_dot = gamma * load<A>(grad_dot + i, w) + or_zero(weight_dot, i, w) * g;
    s[0] = s[0] + v;
    s[1] = s[1] + v * centred;
    s[2] = s[2] + h;
    s[3] = s[3] + h * centred;
    s[4] = s[4] + h_dot;
    s[5] = s[5] + h_dot * centred;
    s[6] = s[6] + h * v;
  });
  const TangentMeans t{total[0] / n, total[1] / n};
  const AdjointMeans a{total[2] / n, total[3] / n};
  const auto f = adjoint_tangent_factors(r, 1, 0, t, a, {total[4] / n, total[5] / n, total[6] / n});
  const auto own = adjoint_factors(r, 1, a);
  const auto moved = tangent_factors(r, 1, 0, 0, t);
  const Lanes<A> by_h_dot = lanes<A>(f.grad_dot), by_h = lanes<A>(f.grad), by_x_dot = lanes<A>(f.x_dot);
  const Lanes<A> by_x = lanes<A>(f.x), constant = lanes<A>(f.constant);
  const Lanes<A> own_h = lanes<A>(own.grad), own_x = lanes<A>(own.x), own_constant = lanes<A>(own.constant);
  const Lanes<A> moved_x_dot = lanes<A>(moved.x_dot), moved_x = lanes<A>(moved.x);
  const Lanes<A> moved_constant = lanes<A>(moved.constant);
  sweep<A>(0, at.size, [=](int64_t i, auto w) {
    const Lanes<A> v = load<A>(x_dot + i, w), centred = load<A>(x + i, w) - mu;
    const Lanes<A> g = load<A>(grad + i, w), g_dot = load<A>(grad_dot + i, w), gamma = or_one(weight, i, w);
    const Lanes<A> h = gamma * g, h_dot = gamma * g_dot + or_zero(weight_dot, i, w) * g;
    store(x_bar_dot + i, by_h_dot * h_dot + by_h * h + by_x_dot * v + by_x * centred + constant, w);
    if constexpr (kBoth) store(x_bar + i, own_h * h + own_x * centred + own_constant, w);
    const Lanes<A> normal_dot = moved_x_dot * v + moved_x * centred + moved_constant;
    store(weight_bar + i, load<A>(weight_bar + i, w) + g_dot * (rstd * centred) + g * normal_dot, w);
    store(bias_bar + i, load<A>(bias_bar + i, w) + g_dot, w);
  });
}

}  // namespace

template <class T>
void layer_norm_tangent(const LayerNormTangent<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) tangent_row(p, row);
}

template <class T>
void layer_norm_adjoint_tangent(const LayerNormAdjointTangent<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin * kNormBlock; row < std::min(end * kNormBlock, p.at.rows); ++row)
    p.x_bar != nullptr ? adjoint_tangent_row<true>(p, row) : adjoint_tangent_row<false>(p, row);
}

#define INSTANTIATE(T)                                                               \
  template void layer_norm_tangent<T>(const LayerNormTangent<T>&, int64_t, int64_t); \
  template void layer_norm_adjoint_tangent<T>(const LayerNormAdjointTangent<T>&, int64_t, int64_t);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

#include "curvature/softmax_cross_entropy_hvp.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "support/dtypes.h"
#include "support/exp.h"
#include "support/scratch.h"
#include "support/vec.h"

namespace blokern {
namespace {

// The largest of a row, NaN if one is: Lanes beyond a tail are zero, so the tail goes by itself.
template <class A, class T>
__attribute__((flatten)) A row_maximum(const T* row, int64_t count) {
  constexpr int64_t width = Lanes<A>::size();
  A top = -std::numeric_limits<A>::infinity();
  int64_t i = 0;
  if (count >= width) {
    Lanes<A> lanes = load<A>(row, Full{});
    for (i = width; i + width <= count; i += width) lanes = larger(lanes, load<A>(row + i, Full{}));
    top = maximum(lanes);
  }
  for (; i < count; ++i) top = larger(top, static_cast<A>(row[i]));
  return top;
}

// What is known of a row's target: Q and Σ q z.
struct Target {
  double total, inner;
};

// A row's q, spread over all classes: of soft targets, or the smoothing of a label. In tails, what is summed
// is what was stored: lanes beyond them are then zero.
template <class T, class A>
__attribute__((flatten)) Target fill_spread(const SoftmaxCrossEntropyHvp<T>& p, const T* target, const T* z,
                                            A* q) {
  const A* const weight = p.weight;
  const Lanes<A> kept(static_cast<A>(1 - p.label_smoothing));
  const Lanes<A> floor(static_cast<A>(p.label_smoothing / static_cast<double>(p.classes)));
  const auto [total, inner] = sums<A, 2>(p.classes, [=](int64_t i, auto w, auto& s) {
    const Lanes<A> own = target != nullptr ? spread_weight(kept, load<A>(target + i, w), floor) : floor;
    store(q + i, weight != nullptr ? own * load<A>(weight + i, w) : own, w);
    const Lanes<A> counted = load<A>(q + i, w);
    s[0] = s[0] + counted;
    s[1] = s[1] + counted * load<A>(z + i, w);
  });
  return {total, inner};
}

// The results of a row; returns p of one class. kSpread: q is read, else it is zero.
template <bool kSpread, class T, class A>
__attribute__((flatten)) double fill_row(const SoftmaxCrossEntropyHvp<T>& p, int64_t row, int64_t one,
                                         Target known, const A* q, A* e) {
  const T* const z = p.logits + row * p.classes;
  const T* const v = p.tangent + row * p.classes;
  T* const grad = p.grad + row * p.classes;
  T* const hvp = p.hvp + row * p.classes;
  const A top = row_maximum<A>(z, p.classes);
  const Lanes<A> shift(top);
  const auto [exps, along] = sums<A, 2>(p.classes, [=](int64_t i, auto w, auto& s) {
    store(e + i, exponential(load<A>(z + i, w) - shift), w);
    const Lanes<A> counted = load<A>(e + i, w);
    s[0] = s[0] + counted;
    s[1] = s[1] + counted * load<A>(v + i, w);
  });
  p.loss[row] = (known.total * (std::log(exps) + static_cast<double>(top)) - known.inner) * p.scale();
  const Lanes<A> inverse(static_cast<A>(1 / exps)), mean(static_cast<A>(along / exps));
  const Lanes<A> total(static_cast<A>(known.total)), scale(static_cast<A>(p.scale()));
  sweep<A>(0, p.classes, [=](int64_t i, auto w) {
    const Lanes<A> probability = load<A>(e + i, w) * inverse;
    const Lanes<A> weight = kSpread ? load<A>(q + i, w) : Lanes<A>();
    store(grad + i, cross_entropy_grad(probability, weight, total, scale), w);
    store(hvp + i, cross_entropy_hvp(probability, load<A>(v + i, w), mean, total, scale), w);
  });
  return static_cast<double>(e[one]) / exps;
}

template <class T, class A>
void labelled_row(const SoftmaxCrossEntropyHvp<T>& p, int64_t row, A* q, A* e) {
  const int64_t label = p.labels[row];
  T* const grad = p.grad + row * p.classes;
  if (label == p.ignore_index) {
    std::fill_n(grad, p.classes, T(0));
    std::fill_n(p.hvp + row * p.classes, p.classes, T(0));
    p.loss[row] = 0 * p.scale();
    return;
  }
  const T* const z = p.logits + row * p.classes;
  const double own = (1 - p.label_smoothing) * p.weight_of(label);
  const bool smooth = p.label_smoothing != 0;
  Target known = smooth ? fill_spread<T>(p, nullptr, z, q) : Target{0, 0};
  const double spread = smooth ? static_cast<double>(q[label]) : 0;
  known.total += own;
  known.inner += own * static_cast<double>(z[label]);
  const double probability =
      smooth ? fill_row<true>(p, row, label, known, q, e) : fill_row<false>(p, row, label, known, q, e);
  grad[label] = static_cast<T>(cross_entropy_grad(probability, spread + own, known.total, p.scale()));
}

}  // namespace

template <class T>
void softmax_cross_entropy_hvp(const SoftmaxCrossEntropyHvp<T>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  A* const e = scratch<A>(2 * p.classes);
  A* const q = e + p.classes;
  for (int64_t row = begin; row < end; ++row) {
    if (p.target == nullptr) {
      labelled_row(p, row, q, e);
    } else {
      const T* const z = p.logits + row * p.classes;
      fill_row<true>(p, row, 0, fill_spread(p, p.target + row * p.classes, z, q), q, e);
    }
  }
}

#define INSTANTIATE(T) \
  template void softmax_cross_entropy_hvp<T>(const SoftmaxCrossEntropyHvp<T>&, int64_t, int64_t);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

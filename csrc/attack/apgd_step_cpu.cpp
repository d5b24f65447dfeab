#include "attack/apgd_step.h"

#include "attack/rows_cpu.h"
#include "support/dtypes.h"

namespace blokern {
namespace {

// The k-th largest |grad| of a sample: entries at least that large are followed, ties among them too.
template <class G, class A>
A kth_magnitude(const G* grad, int64_t size, int64_t k, A* work) {
  for (int64_t i = 0; i < size; ++i) {
    const A g = absolute(static_cast<A>(grad[i]));
    work[i] = g == g ? g : A(0);  // a NaN has no order, and its sign is zero
  }
  std::nth_element(work, work + (k - 1), work + size, [](A a, A b) { return a > b; });
  return work[k - 1];
}

// delta ← (x_adv − x) + step_size · sign(grad) / count over the count entries of |grad| ≥ threshold.
template <class T, class G, class A>
void fill_sparse_step(const T* x_adv, const T* x, const G* grad, A threshold, double step_size, A* delta,
                      int64_t size) {
  const auto signs_at = [=](int64_t i, auto w) {
    return followed_sign(load<A>(grad + i, w), Lanes<A>(threshold));
  };
  const auto [count] =
      sums<A, 1>(size, [=](int64_t i, auto w, auto& s) { s[0] = s[0] + absolute(signs_at(i, w)); });
  const Lanes<A> scale(static_cast<A>(count > 0 ? step_size / count : 0));
  sweep<A>(0, size, [=](int64_t i, auto w) {
    store(delta + i, (load<A>(x_adv + i, w) - load<A>(x + i, w)) + scale * signs_at(i, w), w);
  });
}

// From z to the next iterate: delta ← momentum's point − x, x_prev ← x_adv.
template <class T, class A>
void take_momentum(const A* z, const T* x_adv, T* x_prev, const T* x, double momentum, A* delta,
                   int64_t size) {
  const Lanes<A> m(static_cast<A>(momentum));
  sweep<A>(0, size, [=](int64_t i, auto w) {
    const auto current = load<A>(x_adv + i, w);
    store(delta + i, with_momentum(load<A>(z + i, w), current, load<A>(x_prev + i, w), m) - load<A>(x + i, w),
          w);
    store(x_prev + i, current, w);
  });
}

// The rows common to L2 and L1: fill(n, delta) makes the step, project(n, delta, out) projects it.
template <class T, class G, class A, class Fill, class Projection>
void apgd_rows(const ApgdStep<T, G>& p, int64_t begin, int64_t end, A* delta, A* z, Fill&& fill,
               Projection&& project) {
  const int64_t size = p.batch.size;
  for (int64_t n = begin; n < end; ++n) {
    if (p.batch.skips(n)) continue;
    fill(n, delta);
    if (p.momentum == 1) {
      copy_row<T>(p.x_adv[n], p.x_prev[n], 0, size);
    } else {
      project(n, delta, z);
      take_momentum(z, p.x_adv[n], p.x_prev[n], p.x[n], p.momentum, delta, size);
    }
    project(n, delta, p.x_adv[n]);
  }
}

}  // namespace

template <class T, class G>
void apgd_step_linf(const ApgdStep<T, G>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const Lanes<A> lo(static_cast<A>(p.clip.min)), hi(static_cast<A>(p.clip.max));
  const Lanes<A> momentum(static_cast<A>(p.momentum));
  for_each_row(p.batch, begin, end, [&](int64_t n, int64_t first, int64_t last) {
    if (p.batch.skips(n)) return;
    T* const x_adv = p.x_adv[n];
    T* const x_prev = p.x_prev[n];
    const T* const x = p.x[n];
    const G* const grad = p.grad[n];
    const Lanes<A> step_size(static_cast<A>(p.step_size[n])), eps(radius_in<T>(p.eps[n]));
    sweep<A>(first, last, [=](int64_t i, auto w) {
      const auto current = load<A>(x_adv + i, w), original = load<A>(x + i, w);
      auto next = linf_project<T>(current + step_size * sign(load<A>(grad + i, w)), original, eps, lo, hi);
      if (p.momentum != 1) {
        next = linf_project<T>(with_momentum(next, current, load<A>(x_prev + i, w), momentum), original, eps,
                               lo, hi);
      }
      store(x_prev + i, current, w);
      store(x_adv + i, next, w);
    });
  });
}

template <class T, class G>
void apgd_step_l2(const ApgdStep<T, G>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const int64_t size = p.batch.size;
  A* const delta = scratch<A>(2 * size);
  const auto fill = [&](int64_t n, A* row) {
    const G* const grad = p.grad[n];
    const auto [gg] = sums<A, 1>(size, [=](int64_t i, auto w, auto& s) {
      const auto g = load<A>(grad + i, w);
      s[0] = s[0] + g * g;
    });
    if (!is_safe_norm<A>(gg)) return fill_step_scaled<2>(p.x_adv[n], p.x[n], grad, p.step_size[n], row, size);
    const Lanes<A> scale(static_cast<A>(p.step_size[n] / std::sqrt(gg)));
    sweep<A>(0, size, [=](int64_t i, auto w) {
      store(row + i, (load<A>(p.x_adv[n] + i, w) - load<A>(p.x[n] + i, w)) + scale * load<A>(grad + i, w), w);
    });
  };
  apgd_rows(p, begin, end, delta, delta + size, fill, [&](int64_t n, const A* row, auto* out) {
    l2_project_row(row, p.x[n], p.eps[n], p.clip, out, size);
  });
}

template <class T, class G>
void apgd_step_l1(const ApgdStep<T, G>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const int64_t size = p.batch.size;
  A* const delta = scratch<A>(4 * size);
  A* const work = delta + 2 * size;
  const auto fill = [&](int64_t n, A* row) {
    const int64_t keep = p.keep == nullptr ? size : std::min(p.keep[n], size);
    const A threshold = keep < size ? kth_magnitude(p.grad[n], size, keep, work) : A(0);
    fill_sparse_step(static_cast<const T*>(p.x_adv[n]), p.x[n], p.grad[n], threshold, p.step_size[n], row,
                     size);
  };
  apgd_rows(p, begin, end, delta, delta + size, fill, [&](int64_t n, const A* row, auto* out) {
    l1_project_row(row, p.x[n], p.eps[n], p.clip, out, work, size);
  });
}

#define INSTANTIATE(T, G)                                                      \
  template void apgd_step_linf<T, G>(const ApgdStep<T, G>&, int64_t, int64_t); \
  template void apgd_step_l2<T, G>(const ApgdStep<T, G>&, int64_t, int64_t);   \
  template void apgd_step_l1<T, G>(const ApgdStep<T, G>&, int64_t, int64_t);
BLOKERN_FOR_IMAGE_AND_GRAD(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

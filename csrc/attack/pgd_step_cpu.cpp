#include "attack/pgd_step.h"

#include "attack/rows_cpu.h"
#include "support/dtypes.h"

namespace blokern {

template <class T, class G>
void pgd_step_linf(const PgdStep<T, G>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const Lanes<A> lo(static_cast<A>(p.clip.min)), hi(static_cast<A>(p.clip.max));
  for_each_row(p.batch, begin, end, [&](int64_t n, int64_t first, int64_t last) {
    const T* const x_adv = p.x_adv[n];
    T* const out = p.out[n];
    if (p.batch.skips(n)) return copy_row(x_adv, out, first, last);
    const T* const x = p.x[n];
    const G* const grad = p.grad[n];
    const Lanes<A> step_size(static_cast<A>(p.step_size[n])), eps(radius_in<T>(p.eps[n]));
    sweep<A>(first, last, [=](int64_t i, auto w) {
      store(out + i,
            linf_step<T>(load<A>(x_adv + i, w), load<A>(x + i, w), load<A>(grad + i, w), step_size, eps, lo,
                         hi),
            w);
    });
  });
}

template <class T, class G>
void pgd_step_l2(const PgdStep<T, G>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const int64_t size = p.batch.size;
  const Lanes<A> lo(static_cast<A>(p.clip.min)), hi(static_cast<A>(p.clip.max));
  for (int64_t n = begin; n < end; ++n) {
    const T* const x_adv = p.x_adv[n];
    const T* const x = p.x[n];
    const G* const grad = p.grad[n];
    T* const out = p.out[n];
    if (p.batch.skips(n)) {
      copy_row(x_adv, out, 0, size);
      continue;
    }
    const auto [gg, dd, dg] = sums<A, 3>(size, [=](int64_t i, auto w, auto& s) {
      const auto g = load<A>(grad + i, w);
      const auto d = load<A>(x_adv + i, w) - load<A>(x + i, w);
      s[0] = s[0] + g * g;
      s[1] = s[1] + d * d;
      s[2] = s[2] + d * g;
    });
    const L2Step step = l2_step<A>(gg, dd, dg, p.step_size[n]);
    if (!step.trusted) {
      A* const delta = scratch<A>(size);
      fill_step_scaled<2>(x_adv, x, grad, p.step_size[n], delta, size);
      l2_project_row(delta, x, p.eps[n], p.clip, out, size);
      continue;
    }
    const Lanes<A> s(static_cast<A>(step.scale));
    const Lanes<A> shrink(static_cast<A>(shrink_to(p.eps[n], std::sqrt(step.squared))));
    sweep<A>(0, size, [=](int64_t i, auto w) {
      const auto original = load<A>(x + i, w);
      const auto delta = (load<A>(x_adv + i, w) - original) + s * load<A>(grad + i, w);
      store(out + i, scale_and_clip<T>(delta, original, shrink, lo, hi), w);
    });
  }
}

template <class T, class G>
void pgd_step_l1(const PgdStep<T, G>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const int64_t size = p.batch.size;
  A* const delta = scratch<A>(3 * size);
  for (int64_t n = begin; n < end; ++n) {
    const T* const x_adv = p.x_adv[n];
    const T* const x = p.x[n];
    const G* const grad = p.grad[n];
    if (p.batch.skips(n)) {
      copy_row(x_adv, p.out[n], 0, size);
      continue;
    }
    const auto [norm] =
        sums<A, 1>(size, [=](int64_t i, auto w, auto& s) { s[0] = s[0] + absolute(load<A>(grad + i, w)); });
    if (is_safe_norm<A>(norm)) {
      const Lanes<A> scale(static_cast<A>(p.step_size[n] / norm));
      sweep<A>(0, size, [=](int64_t i, auto w) {
        store(delta + i, (load<A>(x_adv + i, w) - load<A>(x + i, w)) + scale * load<A>(grad + i, w), w);
      });
    } else {
      fill_step_scaled<1>(x_adv, x, grad, p.step_size[n], delta, size);
    }
    l1_project_row(delta, x, p.eps[n], p.clip, p.out[n], delta + size, size);
  }
}

#define INSTANTIATE(T, G)                                                    \
  template void pgd_step_linf<T, G>(const PgdStep<T, G>&, int64_t, int64_t); \
  template void pgd_step_l2<T, G>(const PgdStep<T, G>&, int64_t, int64_t);   \
  template void pgd_step_l1<T, G>(const PgdStep<T, G>&, int64_t, int64_t);
BLOKERN_FOR_IMAGE_AND_GRAD(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

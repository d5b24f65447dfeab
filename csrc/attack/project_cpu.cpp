#include "attack/project.h"

#include "attack/rows_cpu.h"
#include "support/dtypes.h"

namespace blokern {

template <class T>
void project_linf(const Project<T>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const Lanes<A> lo(static_cast<A>(p.clip.min)), hi(static_cast<A>(p.clip.max));
  for_each_row(p.batch, begin, end, [&](int64_t n, int64_t first, int64_t last) {
    const T* const x_adv = p.x_adv[n];
    T* const out = p.out[n];
    if (p.batch.skips(n)) return copy_row(x_adv, out, first, last);
    const T* const x = p.x[n];
    const Lanes<A> eps(radius_in<T>(p.eps[n]));
    sweep<A>(first, last, [=](int64_t i, auto w) {
      store(out + i, linf_project<T>(load<A>(x_adv + i, w), load<A>(x + i, w), eps, lo, hi), w);
    });
  });
}

template <class T>
void project_l2(const Project<T>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  A* const delta = scratch<A>(p.batch.size);
  for (int64_t n = begin; n < end; ++n) {
    if (p.batch.skips(n)) {
      copy_row(p.x_adv[n], p.out[n], 0, p.batch.size);
      continue;
    }
    fill_delta(p.x_adv[n], p.x[n], delta, p.batch.size);
    l2_project_row(delta, p.x[n], p.eps[n], p.clip, p.out[n], p.batch.size);
  }
}

template <class T>
void project_l1(const Project<T>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const int64_t size = p.batch.size;
  A* const delta = scratch<A>(3 * size);
  for (int64_t n = begin; n < end; ++n) {
    if (p.batch.skips(n)) {
      copy_row(p.x_adv[n], p.out[n], 0, size);
      continue;
    }
    fill_delta(p.x_adv[n], p.x[n], delta, size);
    l1_project_row(delta, p.x[n], p.eps[n], p.clip, p.out[n], delta + size, size);
  }
}

#define INSTANTIATE(T)                                                \
  template void project_linf<T>(const Project<T>&, int64_t, int64_t); \
  template void project_l2<T>(const Project<T>&, int64_t, int64_t);   \
  template void project_l1<T>(const Project<T>&, int64_t, int64_t);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

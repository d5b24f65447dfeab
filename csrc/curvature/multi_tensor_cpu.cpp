#include "curvature/multi_tensor.h"

#include "support/dtypes.h"
#include "support/vec.h"

namespace blokern {

template <class T>
double dot(const Dot<T>& p, int64_t /*column*/, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const T *const a = p.a + begin, *const b = p.b + begin;
  return sums<A, 1>(end - begin, [=](int64_t i, auto w, auto& sum) {
    sum[0] = sum[0] + load<A>(a + i, w) * load<A>(b + i, w);
  })[0];
}

template <class T>
void axpby(const Axpby<T>& p, int64_t column, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const double of_x = p.a[column], of_y = p.b[column];
  const bool reads_x = of_x != 0, reads_y = of_y != 0;
  if (!reads_x && of_y == 1) return;
  const Lanes<A> a(static_cast<A>(of_x)), b(static_cast<A>(of_y));
  T* const y = p.y;
  const T* const x = p.x;
  sweep<A>(begin, end, [=](int64_t i, auto w) {
    const Lanes<A> from_x = reads_x ? load<A>(x + i, w) : Lanes<A>();
    const Lanes<A> from_y = reads_y ? load<A>(y + i, w) : Lanes<A>();
    store(y + i, axpby_formula(from_y, from_x, a, b), w);
  });
}

template <class T>
double cg_update(const CgUpdate<T>& p, int64_t column, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const double step_size = p.alpha[column];
  if (step_size == 0) return dot(Dot<T>{p.r, p.r}, column, begin, end);
  const Lanes<A> alpha(static_cast<A>(step_size));
  T *const x = p.x + begin, *const r = p.r + begin;
  const T *const along = p.p + begin, *const ap = p.ap + begin;
  return sums<A, 1>(end - begin, [=](int64_t i, auto w, auto& sum) {
    const auto step = cg_update_formula(load<A>(x + i, w), load<A>(r + i, w), load<A>(along + i, w),
                                        load<A>(ap + i, w), alpha);
    store(x + i, step.x, w);
    store(r + i, step.r, w);
    sum[0] = sum[0] + step.r * step.r;
  })[0];
}

#define INSTANTIATE(T)                                                \
  template double dot<T>(const Dot<T>&, int64_t, int64_t, int64_t);   \
  template void axpby<T>(const Axpby<T>&, int64_t, int64_t, int64_t); \
  template double cg_update<T>(const CgUpdate<T>&, int64_t, int64_t, int64_t);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

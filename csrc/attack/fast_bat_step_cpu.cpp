#include "attack/fast_bat_step.h"

#include "attack/rows_cpu.h"
#include "support/dtypes.h"

namespace blokern {

template <class T, class G>
void fast_bat_step(const FastBatStep<T, G>& p, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const Lanes<A> lo(static_cast<A>(p.clip.min)), hi(static_cast<A>(p.clip.max));
  for_each_row(p.batch, begin, end, [&](int64_t n, int64_t first, int64_t last) {
    const T* const z = p.z[n];
    const T* const x = p.x[n];
    const G* const grad = p.grad[n];
    T* const delta = p.delta[n];
    bool* const free = p.free[n];
    const Lanes<A> step_size(static_cast<A>(p.step_size[n])), eps(sum_below<T>(A(0), radius_in<T>(p.eps[n])));
    sweep<A>(first, last, [=](int64_t i, auto w) {
      const auto step = fast_bat_delta<T>(load<A>(z + i, w), load<A>(x + i, w), load<A>(grad + i, w),
                                          step_size, eps, lo, hi);
      store(delta + i, step.delta, w);
      store(free + i, less(step.lower, step.u) & less(step.u, step.upper), w);
    });
  });
}

#define INSTANTIATE(T, G) template void fast_bat_step<T, G>(const FastBatStep<T, G>&, int64_t, int64_t);
BLOKERN_FOR_IMAGE_AND_GRAD(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

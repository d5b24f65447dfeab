#include "curvature/activation.h"

#include "support/dtypes.h"
#include "support/exp.h"
#include "support/vec.h"

namespace blokern {

template <class T, class Phi>
void activation_adjoint_tangent(const Activation<T>& p, Phi phi, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const T *const saved = p.saved, *const x_dot = p.x_dot, *const grad = p.grad, *const grad_dot = p.grad_dot;
  T *const x_bar = p.x_bar, *const x_bar_dot = p.x_bar_dot;
  sweep<A>(begin, end, [=](int64_t i, auto w) {
    const Slopes<Lanes<A>> slopes = phi(load<A>(saved + i, w));
    const Lanes<A> g = load<A>(grad + i, w);
    const Lanes<A> bent = slopes.second * load<A>(x_dot + i, w) * g;
    store(x_bar_dot + i, slopes.first * load<A>(grad_dot + i, w) + bent, w);
    if (x_bar != nullptr) store(x_bar + i, slopes.first * g, w);
  });
}

#define INSTANTIATE(T, PHI) \
  template void activation_adjoint_tangent<T, PHI>(const Activation<T>&, PHI, int64_t, int64_t);
#define INSTANTIATE_ALL(T) BLOKERN_FOR_ACTIVATION(INSTANTIATE, T)
BLOKERN_FOR_IMAGE(INSTANTIATE_ALL)
#undef INSTANTIATE_ALL
#undef INSTANTIATE

}  // namespace blokern

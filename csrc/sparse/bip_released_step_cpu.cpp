#include "sparse/bip_released_step.h"

#include "sparse/sgd_cpu.h"

namespace blokern {

template <class T>
void bip_released_step(const SgdLayer<T>& p, double implicit, int64_t begin, int64_t end) {
  const T* const grad = p.grad;
  const Lanes<T> lr2(static_cast<T>(implicit));
  descend(p, begin, end, [=](const Lanes<T>& weight, int64_t i, const uint64_t*, int64_t, auto w) {
    return bip_released_gradient(weight, load<T>(grad + i, w), lr2);
  });
}

template void bip_released_step<float>(const SgdLayer<float>&, double, int64_t, int64_t);
template void bip_released_step<double>(const SgdLayer<double>&, double, int64_t, int64_t);

}  // namespace blokern

#include "sparse/bip_score_step.h"

#include "sparse/sgd_cpu.h"

namespace blokern {

template <class T>
void bip_score_step(const SgdLayer<T>& p, double implicit, int64_t begin, int64_t end) {
  const T* const weight = p.weight;
  const T* const grad = p.grad;
  const Lanes<T> inverse_gamma(static_cast<T>(implicit));
  descend(p, begin, end, [=](const Lanes<T>&, int64_t i, const uint64_t* row, int64_t c, auto w) {
    return bip_score_gradient(load<T>(weight + i, w), load<T>(grad + i, w), load_mask<T>(row, c),
                              inverse_gamma);
  });
}

template void bip_score_step<float>(const SgdLayer<float>&, double, int64_t, int64_t);
template void bip_score_step<double>(const SgdLayer<double>&, double, int64_t, int64_t);

}  // namespace blokern

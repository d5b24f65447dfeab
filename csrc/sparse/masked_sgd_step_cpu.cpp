#include "sparse/masked_sgd_step.h"

#include "sparse/sgd_cpu.h"

namespace blokern {

template <class T>
void masked_sgd_step(const SgdLayer<T>& p, int64_t begin, int64_t end) {
  const T* const grad = p.grad;
  descend(p, begin, end, [=](const Lanes<T>&, int64_t i, const uint64_t* row, int64_t c, auto w) {
    return where(load_mask<T>(row, c), load<T>(grad + i, w), Lanes<T>());
  });
}

template void masked_sgd_step<float>(const SgdLayer<float>&, int64_t, int64_t);
template void masked_sgd_step<double>(const SgdLayer<double>&, int64_t, int64_t);

}  // namespace blokern

#include "curvature/softmax_cross_entropy_hvp_cuda.cuh"

#include "support/dtypes.h"

namespace blokern {

template <class T>
void softmax_cross_entropy_hvp(const SoftmaxCrossEntropyHvp<T>& p, const CudaCall& call) {
  const int64_t row_bytes = p.classes * static_cast<int64_t>(sizeof(T)) * (p.target != nullptr ? 5 : 4);
  launch_each_row<SoftmaxCrossEntropyRow>(p, p.classes, kPackSize<T>, row_bytes, call);
}

void label_weights(const LabelWeights& p, double* total, const CudaCall& call) {
  launch_each_row<LabelWeightsRow>(LabelWeightsRow::Params{p, total}, p.rows, kPackSize<int64_t>,
                                   p.rows * static_cast<int64_t>(sizeof(int64_t)), call);
}

#define INSTANTIATE(T) \
  template void softmax_cross_entropy_hvp<T>(const SoftmaxCrossEntropyHvp<T>&, const CudaCall&);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

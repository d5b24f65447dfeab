#include "sparse/masked_sgd_step.h"
#include "sparse/sgd_cuda.cuh"

namespace blokern {
namespace {

template <class T>
struct MaskedGradient {
  static constexpr bool kReadsWeight = false, kReadsMask = true;
  BLOKERN_DEVICE T operator()(T, T, T grad, bool kept) const { return where(kept, grad, T(0)); }
};

}  // namespace

template <class T>
void masked_sgd_step(std::span<const SgdLayer<T>> layers, const CudaCall& call) {
  launch_descend(layers, MaskedGradient<T>{}, call);
}

template void masked_sgd_step<float>(std::span<const SgdLayer<float>>, const CudaCall&);
template void masked_sgd_step<double>(std::span<const SgdLayer<double>>, const CudaCall&);

}  // namespace blokern

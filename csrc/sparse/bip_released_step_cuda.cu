#include "sparse/bip_released_step.h"
#include "sparse/sgd_cuda.cuh"

namespace blokern {
namespace {

template <class T>
struct BipReleasedGradient {
  static constexpr bool kReadsWeight = false, kReadsMask = false;
  T implicit;
  BLOKERN_DEVICE T operator()(T weight, T, T grad, bool) const {
    return bip_released_gradient(weight, grad, implicit);
  }
};

}  // namespace

template <class T>
void bip_released_step(std::span<const SgdLayer<T>> layers, double implicit, const CudaCall& call) {
  launch_descend(layers, BipReleasedGradient<T>{static_cast<T>(implicit)}, call);
}

template void bip_released_step<float>(std::span<const SgdLayer<float>>, double, const CudaCall&);
template void bip_released_step<double>(std::span<const SgdLayer<double>>, double, const CudaCall&);

}  // namespace blokern

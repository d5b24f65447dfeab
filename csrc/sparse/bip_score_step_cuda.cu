#include "sparse/bip_score_step.h"
#include "sparse/sgd_cuda.cuh"

namespace blokern {
namespace {

template <class T>
struct BipScoreGradient {
  static constexpr bool kReadsWeight = true, kReadsMask = true;
  T implicit;
  BLOKERN_DEVICE T operator()(T, T weight, T grad, bool kept) const {
    return bip_score_gradient(weight, grad, kept, implicit);
  }
};

}  // namespace

template <class T>
void bip_score_step(std::span<const SgdLayer<T>> layers, double implicit, const CudaCall& call) {
  launch_descend(layers, BipScoreGradient<T>{static_cast<T>(implicit)}, call);
}

template void bip_score_step<float>(std::span<const SgdLayer<float>>, double, const CudaCall&);
template void bip_score_step<double>(std::span<const SgdLayer<double>>, double, const CudaCall&);

}  // namespace blokern

#include "curvature/batch_norm_cuda.cuh"

#include "support/dtypes.h"

namespace blokern {

template <class T>
void batch_norm_tangent(const BatchNormTangent<T>& p, const CudaCall& call) {
  launch_channels<BatchNormTangentOp>(p, 3, call);
}

template <class T>
void batch_norm_adjoint(const BatchNormAdjoint<T>& p, const CudaCall& call) {
  if (p.grad_dot == nullptr) return launch_channels<BatchNormAdjointOp>(p, 3, call);
  launch_channels<BatchNormAdjointTangentOp>(p, 6, call);
}

#define INSTANTIATE(T)                                                              \
  template void batch_norm_tangent<T>(const BatchNormTangent<T>&, const CudaCall&); \
  template void batch_norm_adjoint<T>(const BatchNormAdjoint<T>&, const CudaCall&);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

#include "curvature/layer_norm_cuda.cuh"

#include <algorithm>

#include "support/dtypes.h"

namespace blokern {

template <class T>
void layer_norm_tangent(const LayerNormTangent<T>& p, const CudaCall& call) {
  const int64_t row_bytes = 3 * p.at.size * static_cast<int64_t>(sizeof(T));
  launch_each_row<LayerNormTangentRow>(p, p.at.size, kPackSize<T>, row_bytes, call);
}

template <class T>
void layer_norm_adjoint_tangent(const LayerNormAdjointTangent<T>& p, const CudaCall& call) {
  const int64_t row_bytes = 6 * p.at.size * static_cast<int64_t>(sizeof(T));
  launch_each_row<LayerNormAdjointTangentRow>(p, p.at.size, kPackSize<T>, row_bytes, call);
}

int64_t layer_norm_blocks(int64_t rows, int64_t kinds) {
  if (rows == 0) return 0;
  // Teams enough for warps to fill the device, each with some rows, so that its sums are few beside them.
  constexpr int64_t kTeams = 16, kRowsATeam = 8;
  const int64_t of_a_kind = (rows - 1) / kinds + 1;
  const int64_t wanted = kTeams * device_attribute(cudaDevAttrMultiProcessorCount) / kinds;
  return std::clamp<int64_t>(wanted, 1, (of_a_kind - 1) / kRowsATeam + 1);
}

#define INSTANTIATE(T)                                                              \
  template void layer_norm_tangent<T>(const LayerNormTangent<T>&, const CudaCall&); \
  template void layer_norm_adjoint_tangent<T>(const LayerNormAdjointTangent<T>&, const CudaCall&);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

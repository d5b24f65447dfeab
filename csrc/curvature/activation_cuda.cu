#include "curvature/activation_cuda.cuh"

#include "support/dtypes.h"

namespace blokern {

template <class T, class Phi>
void activation_adjoint_tangent(const Activation<T>& p, Phi phi, const CudaCall& call) {
  using Row = ActivationRow<Phi>;
  launch_teams(each_row<Row, Team, typename Row::template Params<T>>, {p, phi}, 1, p.size, kPackSize<T>, 0,
               Row::kSlots, call);
}

#define INSTANTIATE(T, PHI) \
  template void activation_adjoint_tangent<T, PHI>(const Activation<T>&, PHI, const CudaCall&);
#define INSTANTIATE_ALL(T) BLOKERN_FOR_ACTIVATION(INSTANTIATE, T)
BLOKERN_FOR_IMAGE(INSTANTIATE_ALL)
#undef INSTANTIATE_ALL
#undef INSTANTIATE

}  // namespace blokern

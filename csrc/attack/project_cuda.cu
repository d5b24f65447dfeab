#include "attack/project_cuda.cuh"

#include "support/dtypes.h"

namespace blokern {

template <class T>
void project_linf(const Project<T>& p, const CudaCall& call) {
  launch_rows<ProjectLinf>(p, call);
}
template <class T>
void project_l2(const Project<T>& p, const CudaCall& call) {
  launch_rows<ProjectRow<L2>>(p, call);
}
template <class T>
void project_l1(const Project<T>& p, const CudaCall& call) {
  launch_rows<ProjectRow<L1>>(p, call);
}

#define INSTANTIATE(T)                                               \
  template void project_linf<T>(const Project<T>&, const CudaCall&); \
  template void project_l2<T>(const Project<T>&, const CudaCall&);   \
  template void project_l1<T>(const Project<T>&, const CudaCall&);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

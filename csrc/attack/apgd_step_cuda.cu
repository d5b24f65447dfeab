#include "attack/apgd_step_cuda.cuh"

#include "support/dtypes.h"

namespace blokern {

template <class T, class G>
void apgd_step_linf(const ApgdStep<T, G>& p, const CudaCall& call) {
  launch_rows<ApgdStepLinf>(p, call);
}
template <class T, class G>
void apgd_step_l2(const ApgdStep<T, G>& p, const CudaCall& call) {
  launch_rows<ApgdStepL2>(p, call);
}
template <class T, class G>
void apgd_step_l1(const ApgdStep<T, G>& p, const CudaCall& call) {
  launch_rows<ApgdStepL1>(p, call);
}

#define INSTANTIATE(T, G)                                                     \
  template void apgd_step_linf<T, G>(const ApgdStep<T, G>&, const CudaCall&); \
  template void apgd_step_l2<T, G>(const ApgdStep<T, G>&, const CudaCall&);   \
  template void apgd_step_l1<T, G>(const ApgdStep<T, G>&, const CudaCall&);
BLOKERN_FOR_IMAGE_AND_GRAD(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

#include "attack/pgd_step_cuda.cuh"

#include "support/dtypes.h"

namespace blokern {

template <class T, class G>
void pgd_step_linf(const PgdStep<T, G>& p, const CudaCall& call) {
  launch_rows<PgdStepLinf>(p, call);
}
template <class T, class G>
void pgd_step_l2(const PgdStep<T, G>& p, const CudaCall& call) {
  launch_rows<PgdStepL2>(p, call);
}
template <class T, class G>
void pgd_step_l1(const PgdStep<T, G>& p, const CudaCall& call) {
  launch_rows<PgdStepL1>(p, call);
}

#define INSTANTIATE(T, G)                                                   \
  template void pgd_step_linf<T, G>(const PgdStep<T, G>&, const CudaCall&); \
  template void pgd_step_l2<T, G>(const PgdStep<T, G>&, const CudaCall&);   \
  template void pgd_step_l1<T, G>(const PgdStep<T, G>&, const CudaCall&);
BLOKERN_FOR_IMAGE_AND_GRAD(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

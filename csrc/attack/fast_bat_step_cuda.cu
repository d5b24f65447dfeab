#include "attack/fast_bat_step_cuda.cuh"

#include "support/dtypes.h"

namespace blokern {

template <class T, class G>
void fast_bat_step(const FastBatStep<T, G>& p, const CudaCall& call) {
  launch_rows<FastBatStepRow>(p, call);
}

#define INSTANTIATE(T, G) template void fast_bat_step<T, G>(const FastBatStep<T, G>&, const CudaCall&);
BLOKERN_FOR_IMAGE_AND_GRAD(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

#include "attack/random_start_cuda.cuh"

#include "support/dtypes.h"

namespace blokern {

template <class T>
void random_start_linf(const RandomStart<T>& p, const CudaCall& call) {
  launch_rows<RandomStartLinf>(p, call);
}
template <class T>
void random_start_l2(const RandomStart<T>& p, const CudaCall& call) {
  launch_rows<RandomStartL2>(p, call);
}
template <class T>
void random_start_l1(const RandomStart<T>& p, const CudaCall& call) {
  launch_rows<RandomStartL1>(p, call);
}

#define INSTANTIATE(T)                                                        \
  template void random_start_linf<T>(const RandomStart<T>&, const CudaCall&); \
  template void random_start_l2<T>(const RandomStart<T>&, const CudaCall&);   \
  template void random_start_l1<T>(const RandomStart<T>&, const CudaCall&);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

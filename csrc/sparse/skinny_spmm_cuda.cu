#include "sparse/skinny_spmm_cuda.cuh"

#include "support/dtypes.h"

namespace blokern {

template <class T>
void skinny_spmm(const SkinnySpmm<T>& p, const CudaCall& call) {
  if (p.mask.rows == 0 || p.samples == 0) return;
  const auto multiply = [&](auto kernel, int rows) {
    // As many threads as a row has packs for, in whole warps.
    const int64_t warps = (p.mask.cols - 1) / (int64_t{kPackSize<T>} * kWarpSize) + 1;
    const int threads = kWarpSize * static_cast<int>(std::clamp<int64_t>(warps, 1, kWarps));
    launch(kernel, (p.mask.rows - 1) / rows + 1, threads, false, call, p);
  };
  if (p.samples == 1) return multiply(multiply_few<T, 4, 1>, 4);
  if (p.samples <= 4) return multiply(multiply_few<T, 4, 4>, 4);
  multiply(multiply_few<T, 2, kFewSamples>, 2);
}

#define INSTANTIATE(T) template void skinny_spmm<T>(const SkinnySpmm<T>&, const CudaCall&);
BLOKERN_FOR_PRODUCT(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

#include "sparse/nm_mask_cuda.cuh"

#include "support/dtypes.h"

namespace blokern {

template <class T>
void nm_mask(const NmMask<T>& p, int* ok, const CudaCall& call) {
  const int64_t entries = p.groups * p.m;
  const auto neighbours = [&](auto kernel) {
    launch_each(kernel, (entries - 1) / kPackSize<T, bool> + 1, 1, call, p, ok);
  };
  if (entries == 0) return;
  if (p.inner == 1 && p.m == 2) return neighbours(nm_mask_neighbours<T, 2>);
  if (p.inner == 1 && p.m == 4) return neighbours(nm_mask_neighbours<T, 4>);
  if (p.inner == 1 && p.m == 8) return neighbours(nm_mask_neighbours<T, 8>);
  launch_each(nm_mask_any<T>, entries, 1, call, p, ok);
}

#define INSTANTIATE(T) template void nm_mask<T>(const NmMask<T>&, int*, const CudaCall&);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

#include "sparse/apply_mask_cuda.cuh"

#include "support/dtypes.h"

namespace blokern {
namespace {

// A pack more where the first begins before the matrix.
template <class T>
int64_t packs_of(const MaskWords& mask) {
  const int64_t size = mask.rows * mask.cols;
  return size == 0 ? 0 : size / kPackSize<T> + 2;
}

}  // namespace

template <class T>
void apply_mask(const MaskWords& mask, const T* weight, T* to, const CudaCall& call) {
  launch_each(masked_packs<T>, packs_of<T>(mask), 1, call, mask, weight, to);
}

template <class T>
void clear_masked(const MaskWords& mask, T* product, const CudaCall& call) {
  launch_each(cleared_packs<T>, packs_of<T>(mask), 1, call, mask, product);
}

#define INSTANTIATE(T)                                                          \
  template void apply_mask<T>(const MaskWords&, const T*, T*, const CudaCall&); \
  template void clear_masked<T>(const MaskWords&, T*, const CudaCall&);
BLOKERN_FOR_PRODUCT(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

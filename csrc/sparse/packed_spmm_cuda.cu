#include "sparse/packed_spmm_cuda.cuh"

#include <algorithm>

#include "support/dtypes.h"

namespace blokern {

template <class T>
void pack_entries(const Stream& stream, const T* weight, int64_t row_stride, int64_t col_stride,
                  Accum<T>* value, const CudaCall& call) {
  launch_each(gather_entries<T>, stream.blocks() * stream.rows, kWarpSize, call, stream, weight, row_stride,
              col_stride, value);
}

template <class T>
void unpack_entries(const Stream& stream, const Accum<T>* value, T* weight, const CudaCall& call) {
  launch_each(scatter_entries<T>, stream.blocks() * stream.rows, kWarpSize, call, stream, value, weight);
}

template <class T>
void packed_spmm(const PackedSpmm<T>& p, const CudaCall& call) {
  const auto multiply = [&](auto kernel, int lane) {
    int group = 1;
    while (group < kWarpSize && group * lane < p.samples) group *= 2;
    const int64_t tiles = (p.samples - 1) / (int64_t{group} * lane) + 1;
    launch_each(kernel, p.stream.rows * tiles, kWarpSize, call, p, group);
  };
  if (p.samples == 0) return;
  if (p.samples == 1) return multiply(multiply_packed<T, 1>, 1);
  if (p.samples == 2) return multiply(multiply_packed<T, 2>, 2);
  multiply(multiply_packed<T, 4>, 4);
}

#define INSTANTIATE(T)                                                                                  \
  template void pack_entries<T>(const Stream&, const T*, int64_t, int64_t, Accum<T>*, const CudaCall&); \
  template void unpack_entries<T>(const Stream&, const Accum<T>*, T*, const CudaCall&);                 \
  template void packed_spmm<T>(const PackedSpmm<T>&, const CudaCall&);
BLOKERN_FOR_PRODUCT(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

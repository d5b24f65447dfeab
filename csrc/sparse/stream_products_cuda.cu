#include "sparse/stream_products_cuda.cuh"

#include <algorithm>

namespace blokern {

template <class T>
void stream_spmm(const StreamSpmm<T>& p, const CudaCall& call) {
  const auto multiply = [&](auto kernel, int lane) {
    const int64_t tiles = (p.samples - 1) / (int64_t{kWarpSize} * lane) + 1;
    launch_each(kernel, p.stream.rows * tiles, kWarpSize, call, p);
  };
  if (p.samples == 0) return;
  if (p.samples > 64) return multiply(multiply_stream<T, 4>, 4);
  if (p.samples > 32) return multiply(multiply_stream<T, 2>, 2);
  multiply(multiply_stream<T, 1>, 1);
}

template <class T>
void stream_sddmm(const StreamSddmm<T>& p, const CudaCall& call) {
  const int64_t a_row = p.entries / std::max<int64_t>(1, p.stream.rows);
  const int64_t splits = std::clamp<int64_t>(a_row / kWarpSize, 1, 64);
  launch_each(inner_products<T>, p.stream.rows * splits, kWarpSize, call, p, splits);
}

#define INSTANTIATE(T)                                                 \
  template void stream_spmm<T>(const StreamSpmm<T>&, const CudaCall&); \
  template void stream_sddmm<T>(const StreamSddmm<T>&, const CudaCall&);
INSTANTIATE(double)
INSTANTIATE(float)
#undef INSTANTIATE

}  // namespace blokern

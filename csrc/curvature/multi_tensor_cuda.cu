#include "curvature/multi_tensor_cuda.cuh"

#include "support/dtypes.h"

namespace blokern {
namespace {

template <class Op, class P>
void launch_list(std::span<const ListTensor<P>> all, const BlockSums& sums, const CudaCall& call) {
  for (size_t first = 0; first < all.size(); first += kListTensors) {
    TensorList<P> list{};
    for (const ListTensor<P>& tensor :
         all.subspan(first, std::min<size_t>(kListTensors, all.size() - first))) {
      list.tensors[list.blocks.count] = tensor;
      list.blocks.append(sums.columns * multi_tensor_cuda_blocks(tensor.size));
    }
    if (list.blocks.blocks() == 0) continue;
    launch(each_block<Op, P>, list.blocks.blocks(), kTeamThreads, false, call, list, sums);
  }
}

}  // namespace

template <class T>
void dot(std::span<const ListTensor<Dot<T>>> list, const BlockSums& sums, const CudaCall& call) {
  launch_list<DotBlock<T>>(list, sums, call);
}

template <class T>
void axpby(std::span<const ListTensor<Axpby<T>>> list, int64_t columns, const CudaCall& call) {
  launch_list<AxpbyBlock<T>>(list, BlockSums{nullptr, columns, 0}, call);
}

template <class T>
void cg_update(std::span<const ListTensor<CgUpdate<T>>> list, const BlockSums& sums, const CudaCall& call) {
  launch_list<CgUpdateBlock<T>>(list, sums, call);
}

void total_of_blocks(const BlockSums& sums, double* total, const CudaCall& call) {
  if (sums.columns != 0) launch(add_blocks, sums.columns, kTeamThreads, false, call, sums, total);
}

#define INSTANTIATE(T)                                                                          \
  template void dot<T>(std::span<const ListTensor<Dot<T>>>, const BlockSums&, const CudaCall&); \
  template void axpby<T>(std::span<const ListTensor<Axpby<T>>>, int64_t, const CudaCall&);      \
  template void cg_update<T>(std::span<const ListTensor<CgUpdate<T>>>, const BlockSums&, const CudaCall&);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern

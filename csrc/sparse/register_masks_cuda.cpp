// Masks as bits on CUDA tensors. Arithmetic: stream_cuda.cuh. Of these ops only mask_stream waits for the
// device: its result is as large as the mask's entries are many.
#include <ATen/ops/cumsum.h>
#include <ATen/ops/zeros.h>

#include "sparse/register_masks.h"
#include "sparse/torch_cuda.h"

namespace blokern {
namespace {

struct CudaMasks : Cuda {
  static Tensor count(const Tensor& words) {
    Tensor count = at::zeros({}, words.options());
    run(words, 0, 0, [&](const CudaCall& call) {
      count_words(static_cast<const uint64_t*>(words.const_data_ptr()), words.numel(),
                  count.mutable_data_ptr<int64_t>(), call);
    });
    return count;
  }

  static int64_t sum_up(const Tensor& start) {
    start.copy_(at::cumsum(start, 0, at::kInt));
    return start[-1].item<int32_t>();
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CUDA, m) { mask_ops::implement<CudaMasks>(m); }

}  // namespace blokern

// The curvature ops on CUDA tensors. Arithmetic: <op>_cuda.cuh. The host never waits for the device, so that
// labels go unchecked: the row of one out of range is NaN.
#include <ATen/ops/sum.h>

#include "cuda_call.h"
#include "curvature/register.h"

namespace blokern {
namespace {

struct Cuda {
  template <class P, class Kernel>
  static void run(const Tensor& like, int64_t /*count*/, int64_t /*cost*/, const P& p, Kernel kernel) {
    on_device_of(like, [&](const CudaCall& call) { kernel(p, call); });
  }

  template <class P, class Kernel>
  static void channels(const Tensor& like, const P& p, Kernel kernel) {
    run(like, 0, 0, p, kernel);
  }

  static int64_t norm_blocks(const Tensor& x, int64_t kinds) {
    const c10::cuda::CUDAGuard guard(x.device());
    return layer_norm_blocks(x.size(0), kinds);
  }

  static Tensor label_weights(const LabelWeights& p, const Tensor& like) {
    Tensor total = at::zeros({}, like.options().dtype(at::kDouble));
    on_device_of(like, [&](const CudaCall& call) {
      blokern::label_weights(p, total.mutable_data_ptr<double>(), call);
    });
    return total;
  }

  static Tensor sum(const Tensor& values) { return values.sum(); }
};

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CUDA, m) { implement<Cuda>(m); }

}  // namespace blokern

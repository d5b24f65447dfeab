// The sparse family's steps over a list of layers on CUDA tensors, many layers a
// launch. Arithmetic: pruning_cuda.cuh.
#include <span>

#include "sparse/register_pruning.h"
#include "sparse/torch_cuda.h"

namespace blokern {
namespace {

struct CudaLayers : Cuda {
  template <class T, class Step>
  static void layers(const Tensor& like, const std::vector<SgdLayer<T>>& list, Step step) {
    run(like, 0, 0, [&](const CudaCall& call) { step(std::span<const SgdLayer<T>>(list), call); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CUDA, m) { pruning_ops::implement<CudaLayers>(m); }

}  // namespace blokern

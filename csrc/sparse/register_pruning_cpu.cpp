// The sparse family's steps over a list of layers on CPU tensors: threads. Arithmetic:
// bip_score_step_cpu.cpp, bip_released_step_cpu.cpp, masked_sgd_step_cpu.cpp.
#include "sparse/register_pruning.h"
#include "sparse/torch_cpu.h"

namespace blokern {
namespace {

struct CpuLayers : Cpu {
  template <class T, class Step>
  static void layers(const Tensor& like, const std::vector<SgdLayer<T>>& list, Step step) {
    for (const SgdLayer<T>& layer : list)
      run(like, layer.rows, layer.cols, [&](int64_t begin, int64_t end) { step(layer, begin, end); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) { pruning_ops::implement<CpuLayers>(m); }

}  // namespace blokern

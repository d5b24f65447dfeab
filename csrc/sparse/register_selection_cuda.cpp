// The sparse family's selections on CUDA tensors. Arithmetic: topk_mask_cuda.cuh, nm_mask_cuda.cuh. The host
// never waits for the device, so that a NaN cannot be a ValueError: it is an assertion on the device, as
// torch's own kernels have them for bad indices, and the next call that waits for the device raises it.
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/ones.h>

#include "cuda_call.h"
#include "sparse/register_selection.h"

namespace blokern {
namespace {

using at::Tensor;
using selection_ops::Layer;

// run(ok, call), where ok is 1 on the device, and the kernels make it 0 for a NaN.
template <class Run>
void without_nan(const Tensor& like, Run run) {
  Tensor ok = at::ones({}, like.options().dtype(at::kInt));
  on_device_of(like, [&](const CudaCall& call) { run(ok.mutable_data_ptr<int>(), call); });
  at::_assert_async(ok, "blokern: scores must have no NaN");
}

ScoreType score_type(at::ScalarType type) {
  if (type == at::kDouble) return ScoreType::float64;
  if (type == at::kFloat) return ScoreType::float32;
  return type == at::kBFloat16 ? ScoreType::bfloat16 : ScoreType::float16;
}

struct CudaSelection {
  static void topk_mask(const std::vector<Layer>& layers, const std::vector<int64_t>& wanted,
                        bool any_double) {
    std::vector<ScoreLayer> list;
    for (const Layer& layer : layers)
      list.push_back({layer.scores.const_data_ptr(), layer.mask.mutable_data_ptr<bool>(),
                      layer.end - layer.begin, static_cast<int32_t>(layer.selection),
                      score_type(layer.scores.scalar_type())});
    without_nan(layers[0].scores, [&](int* ok, const CudaCall& call) {
      any_double ? blokern::topk_mask<uint64_t>(list, wanted, ok, call)
                 : blokern::topk_mask<uint32_t>(list, wanted, ok, call);
    });
  }

  template <class T>
  static void nm_mask(const NmMask<T>& p, const Tensor& scores) {
    without_nan(scores, [&](int* ok, const CudaCall& call) { blokern::nm_mask(p, ok, call); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CUDA, m) { selection_ops::implement<CudaSelection>(m); }

}  // namespace blokern

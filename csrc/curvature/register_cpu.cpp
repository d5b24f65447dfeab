// The curvature ops on CPU tensors: torch's threads. Arithmetic: <op>_cpu.cpp.
#include <ATen/ops/scalar_tensor.h>

#include <numeric>

#include "curvature/register.h"
#include "threads.h"

namespace blokern {
namespace {

struct Cpu {
  template <class P, class Kernel>
  static void run(const Tensor& /*like*/, int64_t count, int64_t cost, const P& p, Kernel kernel) {
    at::parallel_for(0, count, grain(cost), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  // Over channels, or over groups of them where they are inner.
  template <template <class> class P, class T, class Kernel>
  static void channels(const Tensor& like, const P<T>& p, Kernel kernel) {
    const int64_t width = p.shape.channels_inner ? channel_group<T>() : 1;
    run(like, (p.shape.channels + width - 1) / width, p.shape.samples * p.shape.pixels * width, p, kernel);
  }

  static int64_t norm_blocks(const Tensor& x, int64_t /*kinds*/) {
    return (x.size(0) + kNormBlock - 1) / kNormBlock;
  }

  static Tensor label_weights(const LabelWeights& p, const Tensor& like) {
    double total = 0;
    for (int64_t n = 0; n < p.rows; ++n) {
      const int64_t label = p.labels[n];
      if (label == p.ignore_index) continue;
      TORCH_CHECK_VALUE(label >= 0 && label < p.classes, "target must be in [0, ", p.classes, "), or ",
                        p.ignore_index, " to be ignored, got ", label, " in row ", n);
      total += p.weight != nullptr ? p.weight[label] : 1;
    }
    return at::scalar_tensor(total, like.options().dtype(at::kDouble));
  }

  // In one order, whatever the number of threads.
  static Tensor sum(const Tensor& values) {
    const double* const v = values.const_data_ptr<double>();
    return at::scalar_tensor(std::accumulate(v, v + values.numel(), 0.0), values.options());
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) { implement<Cpu>(m); }

}  // namespace blokern

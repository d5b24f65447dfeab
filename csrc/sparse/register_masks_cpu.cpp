// Masks as bits on CPU tensors. Arithmetic: stream_cpu.cpp.
#include <ATen/ops/empty.h>

#include <bit>
#include <numeric>

#include "sparse/register_masks.h"
#include "sparse/torch_cpu.h"

namespace blokern {
namespace {

struct CpuMasks : Cpu {
  static Tensor count(const Tensor& words) {
    const auto* const data = static_cast<const uint64_t*>(words.const_data_ptr());
    Tensor count = at::empty({}, words.options());
    *count.mutable_data_ptr<int64_t>() =
        std::accumulate(data, data + words.numel(), int64_t(0),
                        [](int64_t sum, uint64_t word) { return sum + std::popcount(word); });
    return count;
  }

  static int64_t sum_up(const Tensor& start) {
    int32_t* const starts = start.mutable_data_ptr<int32_t>();
    std::partial_sum(starts, starts + start.numel(), starts);
    return starts[start.numel() - 1];
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) { mask_ops::implement<CpuMasks>(m); }

}  // namespace blokern

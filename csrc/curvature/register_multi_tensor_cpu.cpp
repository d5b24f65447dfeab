// Products and updates of lists of tensors on the CPU: threads. Arithmetic: multi_tensor_cpu.cpp.
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "curvature/multi_tensor_host.h"
#include "threads.h"

namespace blokern {
namespace {

struct Block {
  size_t tensor;
  int64_t column, begin, end;
};

std::vector<Block> blocks_of(at::TensorList list) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < list.size(); ++i) {
    const int64_t columns = list[i].size(0), size = multi_tensor_ops::column_size(list[i]);
    for (int64_t k = 0; k < columns; ++k) {
      for (int64_t begin = 0; begin < size; begin += kMultiTensorBlock)
        blocks.push_back({i, k, k * size + begin, k * size + std::min(size, begin + kMultiTensorBlock)});
    }
  }
  return blocks;
}

// work<T>(block, its number) for each block, T its tensor's type, the threads' beside one another.
template <class Work>
void over(const std::vector<Block>& blocks, at::TensorList list, Work&& work) {
  int64_t elements = 0;
  for (const Block& block : blocks) elements += block.end - block.begin;
  const auto count = static_cast<int64_t>(blocks.size());
  at::parallel_for(0, count, grain(elements / std::max<int64_t>(1, count)), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      dispatch_image(list[blocks[i].tensor].scalar_type(),
                     [&]<class T>() { work.template operator()<T>(blocks[i], i); });
    }
  });
}

struct Cpu {
  template <class Make, class Kernel>
  static void run(at::TensorList list, const Make& make, Kernel kernel) {
    over(blocks_of(list), list, [&]<class T>(const Block& at, int64_t) {
      kernel(make.template operator()<T>(at.tensor), at.column, at.begin, at.end);
    });
  }

  // Added up in the blocks' order.
  template <class Make, class Kernel>
  static Tensor sums(at::TensorList list, const Make& make, Kernel kernel) {
    const std::vector<Block> blocks = blocks_of(list);
    std::vector<double> found(blocks.size());
    over(blocks, list, [&]<class T>(const Block& at, int64_t i) {
      found[i] = kernel(make.template operator()<T>(at.tensor), at.column, at.begin, at.end);
    });
    Tensor total = at::zeros({list[0].size(0)}, list[0].options().dtype(at::kDouble));
    auto* const sum = total.mutable_data_ptr<double>();
    for (size_t i = 0; i < blocks.size(); ++i) sum[blocks[i].column] += found[i];
    return total;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) { multi_tensor_ops::implement<Cpu>(m); }

}  // namespace blokern

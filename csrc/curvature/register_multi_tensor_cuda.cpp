// Products and updates of lists of tensors on CUDA: a launch for each dtype, and one for the columns' sums.
// Arithmetic: multi_tensor_cuda.cuh.
#include <ATen/ops/empty.h>

#include "cuda_call.h"
#include "curvature/multi_tensor_host.h"

namespace blokern {
namespace {

struct Cuda {
  template <class Make, class Kernel>
  static void run(at::TensorList list, const Make& make, Kernel kernel) {
    const int64_t columns = list[0].size(0);
    on_device_of(list[0], [&](const CudaCall& call) {
      each_type(list, make, [&](const auto& tensors) { kernel(tensors, columns, call); });
    });
  }

  template <class Make, class Kernel>
  static Tensor sums(at::TensorList list, const Make& make, Kernel kernel) {
    const int64_t columns = list[0].size(0);
    const at::TensorOptions wide = list[0].options().dtype(at::kDouble);
    int64_t count = 0;
    for (const Tensor& t : list) count += multi_tensor_cuda_blocks(multi_tensor_ops::column_size(t));
    const Tensor memory = at::empty({columns, count}, wide);
    Tensor total = at::empty({columns}, wide);
    const BlockSums sums{memory.mutable_data_ptr<double>(), columns, count};
    on_device_of(list[0], [&](const CudaCall& call) {
      each_type(list, make, [&](const auto& tensors) { kernel(tensors, sums, call); });
      total_of_blocks(sums, total.mutable_data_ptr<double>(), call);
    });
    return total;
  }

 private:
  // work(the list's tensors of one type), for each type there is.
  template <class Make, class Work>
  static void each_type(at::TensorList list, const Make& make, Work work) {
    for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
      dispatch_image(type, [&]<class T>() {
        using P = decltype(make.template operator()<T>(0));
        std::vector<ListTensor<P>> tensors;
        int64_t place = 0;
        for (size_t i = 0; i < list.size(); ++i) {
          const int64_t size = multi_tensor_ops::column_size(list[i]);
          if (list[i].scalar_type() == type) tensors.push_back({make.template operator()<T>(i), size, place});
          place += multi_tensor_cuda_blocks(size);
        }
        if (!tensors.empty()) work(std::span<const ListTensor<P>>(tensors));
      });
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CUDA, m) { multi_tensor_ops::implement<Cuda>(m); }

}  // namespace blokern

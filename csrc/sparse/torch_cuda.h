// The sparse ops on CUDA tensors: where their kernels are queued.
#pragma once

#include "cuda_call.h"
#include "sparse/products_cuda.h"
#include "sparse/torch_ops.h"

namespace blokern {

struct Cuda {
  template <class Kernel>
  static void run(const Tensor& like, int64_t /*count*/, int64_t /*cost*/, Kernel kernel) {
    on_device_of(like, kernel);
  }

  template <class T>
  static void apply_mask(const MaskWords& mask, const T* weight, T* to, const CudaCall& call) {
    blokern::apply_mask(mask, weight, to, call);
  }
};

}  // namespace blokern

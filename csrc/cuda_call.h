// Where the registrations of CUDA ops queue work: a tensor's device, its current stream, torch's memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "support/cuda/call.h"

namespace blokern {

// run(call): memory that the call was given is torch's again once its work is queued, and reused in the
// stream's order.
template <class Run>
void on_device_of(const at::Tensor& like, Run run) {
  const c10::cuda::CUDAGuard guard(like.device());
  std::vector<at::Tensor> memory;
  run(CudaCall{c10::cuda::getCurrentCUDAStream().stream(), [&](size_t bytes) {
                 memory.push_back(at::zeros({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte)));
                 return memory.back().mutable_data_ptr();
               }});
}

}  // namespace blokern

// What a host function that launches kernels is told by its caller, who has the allocator: no torch,
// no CUDA header.
#pragma once

#include <cstddef>
#include <functional>

struct CUstream_st;

namespace blokern {

struct CudaCall {
  CUstream_st* stream;
  // Zeroed memory on the device, in the stream's order, that lives until the work queued by this
  // call is done.
  std::function<void*(size_t bytes)> zeros;
};

}  // namespace blokern

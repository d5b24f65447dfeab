// The CUDA runtime as kernels use it, from nvcc or from its emulation (tests/native/cuda_emulation), and
// launches that throw where they fail.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "support/cuda/call.h"
#include "support/math.h"

#if defined(__CUDACC__)
#define BLOKERN_DEVICE __device__ __forceinline__
// An array that a block shares: an allocation of its own, poisoned, under emulation.
#define BLOKERN_SHARED(type, name, count) __shared__ type name[count]
#else
#define BLOKERN_DEVICE inline
#endif

namespace blokern {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// kernel(arguments...) on `blocks` blocks. cooperative: all of them run at once, so that they may wait for
// each other.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, bool cooperative,
            const CudaCall& call, const Arguments&... arguments) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  if (blocks > most) throw std::runtime_error("blokern: a launch of more blocks than CUDA has");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative ? 1 : 0;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = call.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "blokern: a CUDA kernel could not be launched");
}

inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "blokern: no CUDA device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "blokern: the CUDA device cannot be asked");
  return value;
}

}  // namespace blokern

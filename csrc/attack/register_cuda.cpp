// The attack ops on CUDA tensors: their device, its current stream, torch's memory. Arithmetic:
// <op>_cuda.cuh. The host never waits for the device, so that values in tensors (eps, step_size, keep) go
// unchecked.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>

#include "attack/register.h"
#include "cuda_call.h"

namespace blokern {
namespace {

struct Cuda {
  static constexpr bool readable = false;

  template <class P, class Kernel>
  static void elements(const at::Tensor& like, const P& p, Kernel kernel) {
    on_device_of(like, [&](const CudaCall& call) { kernel(p, call); });
  }

  template <class P, class Kernel>
  static void samples(const at::Tensor& like, const P& p, Kernel kernel) {
    elements(like, p, kernel);
  }

  // Of a CPU generator, torch's own by default: the numbers are then those of the CPU. Of a CUDA generator,
  // its next counter's words.
  static uint64_t draw_seed(std::optional<at::Generator> generator, const at::Tensor& like) {
    if (!generator.has_value() || generator->device().is_cpu()) {
      auto* const gen =
          at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
      const std::lock_guard<std::mutex> lock(gen->mutex_);
      return gen->random64();
    }
    TORCH_CHECK_VALUE(generator->device() == like.device(),
                      "generator must be on the CPU or on the device of x, ", like.device(), ", got ",
                      generator->device());
    auto* const gen = at::check_generator<at::CUDAGeneratorImpl>(generator);
    const std::lock_guard<std::mutex> lock(gen->mutex_);
    const auto [seed, offset] = gen->philox_engine_inputs(4);
    const PhiloxWords words =
        philox(static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), 0, 0, seed);
    return static_cast<uint64_t>(words.v[0]) << 32 | words.v[1];
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CUDA, m) { attack_ops::implement<Cuda>(m); }

}  // namespace blokern

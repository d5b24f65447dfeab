// The attack ops on CPU tensors: torch's threads and generator. Arithmetic: <op>_cpu.cpp.
#include <ATen/CPUGeneratorImpl.h>

#include "attack/register.h"
#include "threads.h"

namespace blokern {
namespace {

struct Cpu {
  static constexpr bool readable = true;

  template <class P, class Kernel>
  static void elements(const at::Tensor& /*like*/, const P& p, Kernel kernel) {
    at::parallel_for(0, p.batch.samples * p.batch.size, kGrain,
                     [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  template <class P, class Kernel>
  static void samples(const at::Tensor& /*like*/, const P& p, Kernel kernel) {
    if (p.batch.size == 0) return;
    at::parallel_for(0, p.batch.samples, grain(p.batch.size),
                     [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  static uint64_t draw_seed(std::optional<at::Generator> generator, const at::Tensor& /*like*/) {
    auto* const gen =
        at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
    const std::lock_guard<std::mutex> lock(gen->mutex_);
    return gen->random64();
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) { attack_ops::implement<Cpu>(m); }

}  // namespace blokern

// blokern._C: the op library's schemas (library.cpp), and each op as a plain function, which in eager code
// costs a third of a call through torch.ops. Both ways end in the dispatcher. The only file that knows
// Python: of torch/extension.h it includes the tensors' conversions alone, which halves its compile time.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class R, class... Args>
void bind(pybind11::module_& m, const std::string& name) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("blokern::" + name).c_str(), "");
  const auto typed = op.typed<R(Args...)>();
  m.def(name.c_str(),
        torch::wrap_pybind_function_no_gil([typed](Args... args) -> R { return typed.call(args...); }));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using T = const Tensor&;
  using Each = const OptionalTensor&;
  m.doc() = "blokern's ops as plain functions; blokern.ops is the documented face.";
  bind<Tensor, T, T, T, double, double, Each, Each, int64_t, double, double, Each>(m, "pgd_step");
  bind<void, T, T, T, double, double, Each, Each, int64_t, double, double, Each>(m, "pgd_step_");
  bind<Tensor, T, T, double, Each, int64_t, double, double, Each>(m, "project");
  bind<void, T, T, double, Each, int64_t, double, double, Each>(m, "project_");
  bind<void, T, T, T, T, double, double, Each, Each, double, int64_t, double, double, Each, Each>(
      m, "apgd_step_");
  bind<Tensor, T, double, Each, int64_t, double, double, int64_t, std::optional<at::Generator>>(
      m, "random_start");
  bind<std::tuple<Tensor, Tensor>, T, T, T, double, double, Each, Each, double, double>(m, "fast_bat_step");
  bind<int64_t, T, T>(m, "mask_fingerprint");
  m.attr("compiler") = "g++ " __VERSION__;
  m.attr("torch_version") = BLOKERN_TORCH_VERSION;
  m.attr("cpu_capabilities") = BLOKERN_CPU_CAPABILITIES;
  m.attr("cuda") = BLOKERN_CUDA;
}

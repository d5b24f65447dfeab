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

// Binds one overload of an op; overloads share a Python name, and pybind11 chooses by the arguments' types.
template <class R, class... Args>
void bind(pybind11::module_& m, const std::string& name, const char* overload) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("blokern::" + name).c_str(), overload);
  const auto typed = op.typed<R(Args...)>();
  m.def(name.c_str(),
        torch::wrap_pybind_function_no_gil([typed](Args... args) -> R { return typed.call(args...); }));
}

template <class Number>
void bind_attack(pybind11::module_& m, const char* overload) {
  using T = const Tensor&;
  using Active = const OptionalTensor&;
  for (const std::string norm : {"linf", "l2", "l1"}) {
    bind<Tensor, T, T, T, Number, Number, double, double, Active>(m, "pgd_step_" + norm, overload);
    bind<void, T, T, T, Number, Number, double, double, Active>(m, "pgd_step_" + norm + "_", overload);
    bind<Tensor, T, T, Number, double, double, Active>(m, "project_" + norm, overload);
    bind<void, T, T, Number, double, double, Active>(m, "project_" + norm + "_", overload);
    bind<void, T, T, T, T, Number, Number, double, double, double, Active, Active>(
        m, "apgd_step_" + norm + "_", overload);
    bind<Tensor, T, Number, double, double, int64_t, std::optional<at::Generator>>(m, "random_start_" + norm,
                                                                                   overload);
  }
  bind<std::tuple<Tensor, Tensor>, T, T, T, Number, Number, double, double>(m, "fast_bat_step", overload);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "blokern's ops as plain functions; blokern.ops is the documented face.";
  bind_attack<double>(m, "");
  bind_attack<const Tensor&>(m, "per_sample");
  bind<int64_t, const Tensor&, const Tensor&>(m, "mask_fingerprint", "");
  m.attr("compiler") = "g++ " __VERSION__;
  m.attr("torch_version") = BLOKERN_TORCH_VERSION;
  m.attr("cpu_capabilities") = BLOKERN_CPU_CAPABILITIES;
  m.attr("cuda") = BLOKERN_CUDA;
}

// The activations' second derivatives on CPU tensors: checks, layout, threads. Arithmetic:
// activation_cpu.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "curvature/activation.h"
#include "curvature/torch_cpu.h"
#include "support/dispatch.h"

namespace blokern {
namespace {

constexpr int64_t kOperations = 4;  // times as many an element as other kernels of this family have

// t, or a stack of such, with every element where `like` has its own.
Tensor arranged(const Tensor& t, const Tensor& like) {
  std::vector<int64_t> strides = like.strides().vec();
  if (t.dim() > like.dim()) strides.insert(strides.begin(), like.numel());
  if (t.strides() == at::IntArrayRef(strides)) return t;
  return at::empty_strided(t.sizes(), strides, t.options()).copy_(t);
}

template <class Phi>
std::tuple<Tensor, Tensor> run(const Tensor& grad, const Tensor& grad_dot, const Tensor& saved,
                               const Tensor& x_dot, bool adjoint, Phi phi) {
  checks::floating(saved, "saved");
  checks::same_images(grad, "grad", saved, "saved");
  checks::constant(grad, "grad");
  const Stack stack = check_tangents(grad_dot, x_dot, saved, "saved");
  // Dense, in the order of saved's dimensions.
  const Tensor at = arranged(saved, at::empty_like(saved));
  const Tensor g = arranged(grad, at), g_dot = arranged(grad_dot, at), v = arranged(x_dot, at);
  Tensor x_bar =
      adjoint ? at::empty_strided(at.sizes(), at.strides(), at.options()) : at::empty({0}, at.options());
  Tensor x_bar_dot = at::empty_strided(v.sizes(), v.strides(), v.options());
  const int64_t size = at.numel();
  dispatch_image(at.scalar_type(), [&]<class T>() {
    for (int64_t k = 0; k < stack.value_or(1); ++k) {
      const Activation<T> p{at.const_data_ptr<T>(),
                            v.const_data_ptr<T>() + k * size,
                            g.const_data_ptr<T>(),
                            g_dot.const_data_ptr<T>() + k * size,
                            adjoint && k == 0 ? x_bar.mutable_data_ptr<T>() : nullptr,
                            x_bar_dot.mutable_data_ptr<T>() + k * size};
      at::parallel_for(0, size, kGrain / kOperations,
                       [&](int64_t b, int64_t e) { activation_adjoint_tangent(p, phi, b, e); });
    }
  });
  return {x_bar, x_bar_dot};
}

using Call = std::tuple<Tensor, Tensor>;
#define OPERANDS \
  const Tensor &grad, const Tensor &grad_dot, const Tensor &saved, const Tensor &x_dot, bool adjoint
#define GIVEN grad, grad_dot, saved, x_dot, adjoint

template <class Phi>
Call plain(OPERANDS) {
  return run(GIVEN, Phi{});
}

Call softplus(OPERANDS, double beta, double threshold) { return run(GIVEN, Softplus{beta, threshold}); }

Call elu(OPERANDS, double alpha, double scale, double input_scale) {
  return run(GIVEN, Elu{alpha, scale, input_scale});
}

#undef GIVEN
#undef OPERANDS

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) {
  m.impl("tanh_adjoint_tangent", plain<Tanh>);
  m.impl("sigmoid_adjoint_tangent", plain<Sigmoid>);
  m.impl("silu_adjoint_tangent", plain<Silu>);
  m.impl("gelu_adjoint_tangent", plain<Gelu>);
  m.impl("gelu_tanh_adjoint_tangent", plain<GeluTanh>);
  m.impl("softplus_adjoint_tangent", softplus);
  m.impl("elu_adjoint_tangent", elu);
}

}  // namespace blokern

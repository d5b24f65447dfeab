// The activations' second derivatives on tensors of any device: checks, layout. Arithmetic:
// activation_<device>. Devices: register_<device>.cpp.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "curvature/activation.h"
#include "curvature/stacks.h"
#include "support/dispatch.h"

namespace blokern::activation_ops {

constexpr int64_t kOperations = 4;  // times as many an element as other kernels of this family have

// t, or a stack of such, with every element where `like` has its own.
inline Tensor arranged(const Tensor& t, const Tensor& like) {
  std::vector<int64_t> strides = like.strides().vec();
  if (t.dim() > like.dim()) strides.insert(strides.begin(), like.numel());
  if (t.strides() == at::IntArrayRef(strides)) return t;
  return at::empty_strided(t.sizes(), strides, t.options()).copy_(t);
}

template <class Device, class Phi>
std::tuple<Tensor, Tensor> run(const Tensor& grad, const Tensor& grad_dot, const Tensor& saved,
                               const Tensor& x_dot, bool adjoint, Phi phi) {
  checks::floating(saved, "saved");
  checks::same_images(grad, "grad", saved, "saved");
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
      const Activation<T> p{size,
                            at.const_data_ptr<T>(),
                            v.const_data_ptr<T>() + k * size,
                            g.const_data_ptr<T>(),
                            g_dot.const_data_ptr<T>() + k * size,
                            adjoint && k == 0 ? x_bar.mutable_data_ptr<T>() : nullptr,
                            x_bar_dot.mutable_data_ptr<T>() + k * size};
      Device::run(at, size, kOperations, p,
                  [phi](const auto& p, const auto&... how) { activation_adjoint_tangent(p, phi, how...); });
    }
  });
  return {x_bar, x_bar_dot};
}

using Call = std::tuple<Tensor, Tensor>;
#define OPERANDS \
  const Tensor &grad, const Tensor &grad_dot, const Tensor &saved, const Tensor &x_dot, bool adjoint
#define GIVEN grad, grad_dot, saved, x_dot, adjoint

template <class Device, class Phi>
Call plain(OPERANDS) {
  return run<Device>(GIVEN, Phi{});
}

template <class Device>
Call softplus(OPERANDS, double beta, double threshold) {
  return run<Device>(GIVEN, Softplus{beta, threshold});
}

template <class Device>
Call elu(OPERANDS, double alpha, double scale, double input_scale) {
  return run<Device>(GIVEN, Elu{alpha, scale, input_scale});
}

#undef GIVEN
#undef OPERANDS

}  // namespace blokern::activation_ops

// Batch normalisation's derivatives on tensors of any device: checks, layout. Arithmetic:
// batch_norm_<device>. Devices: register_<device>.cpp.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "curvature/batch_norm.h"
#include "curvature/stacks.h"
#include "support/dispatch.h"

namespace blokern::batch_norm_ops {

// How all tensors of a call lie: as x does if that is dense with pixels or channels innermost, else
// contiguous.
class Layout {
 public:
  explicit Layout(const Tensor& x) {
    const int64_t dims = x.dim(), samples = x.size(0), channels = x.size(1);
    const bool inner =
        dims == 2 ? x.is_contiguous() : !x.is_contiguous() && channels_moved(x).is_contiguous();
    shape = {samples, channels, samples * channels == 0 ? 0 : x.numel() / (samples * channels), inner};
  }

  // t, of x's dims or with a leading stack of them, with elements where the layout has them.
  Tensor arranged(const Tensor& t, int64_t dims) const {
    if (!moves(dims)) return t.contiguous();
    return t.movedim(t.dim() - dims + 1, -1).contiguous().movedim(-1, t.dim() - dims + 1);
  }

  Tensor empty(const Tensor& like, int64_t dims, Stack stack) const {
    std::vector<int64_t> sizes;
    if (stack.has_value()) sizes.push_back(*stack);
    sizes.insert(sizes.end(), like.sizes().begin(), like.sizes().end());
    if (!moves(dims)) return at::empty(sizes, like.options());
    const int64_t channel = stack.has_value() ? 2 : 1;
    sizes.push_back(sizes[channel]);
    sizes.erase(sizes.begin() + channel);
    return at::empty(sizes, like.options()).movedim(-1, channel);
  }

  Channels shape;

 private:
  static Tensor channels_moved(const Tensor& t) { return t.movedim(1, -1); }
  bool moves(int64_t dims) const { return shape.channels_inner && dims > 2; }
};

// The values of channels as the kernels take them: of one vector, or of all of a stack.
class Values {
 public:
  Values(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
         const OptionalTensor& weight_dot, const OptionalTensor& bias_dot, Stack stack)
      : mean_(channels(mean, "mean", x, {})),
        rstd_(channels(rstd, "rstd", x, {})),
        weight_(channels(weight, "weight", x, {})),
        weight_dot_(channels(weight_dot, "weight_dot", x, stack)),
        bias_dot_(channels(bias_dot, "bias_dot", x, stack)),
        count_(x.size(1)) {}

  ChannelValues of(int64_t vector) const {
    return {data(mean_, 0), data(rstd_, 0), data(weight_, 0), data(weight_dot_, vector),
            data(bias_dot_, vector)};
  }

 private:
  static Tensor channels(const OptionalTensor& t, const char* name, const Tensor& x, Stack stack) {
    if (!t.has_value()) return {};
    checks::same_device(*t, name, x, "x");
    const bool fits = stack.has_value() ? t->dim() == 2 && t->size(0) == *stack && t->size(1) == x.size(1)
                                        : t->dim() == 1 && t->size(0) == x.size(1);
    TORCH_CHECK_VALUE(fits, name, " must have one value for each of ", x.size(1),
                      " channels (and vector of a stack), got shape ", t->sizes());
    return t->to(at::kDouble).contiguous();
  }

  const double* data(const Tensor& t, int64_t vector) const {
    return t.defined() ? t.const_data_ptr<double>() + vector * count_ : nullptr;
  }

  Tensor mean_, rstd_, weight_, weight_dot_, bias_dot_;
  int64_t count_;
};

inline void check_x(const Tensor& x) {
  checks::floating(x, "x");
  TORCH_CHECK_VALUE(x.dim() >= 2, "x must be [N, C, ...], got shape ", x.sizes());
}

inline void check_like(const Tensor& t, const char* name, const Tensor& x) {
  checks::same_images(t, name, x, "x");
}

template <class T>
const T* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}
template <class T>
T* mutable_or_null(const Tensor& t, int64_t offset) {
  return t.defined() ? t.mutable_data_ptr<T>() + offset : nullptr;
}

template <class Device>
Tensor batch_norm_tangent(const Tensor& x, const Tensor& x_dot, const Tensor& mean, const Tensor& rstd,
                          const OptionalTensor& weight, const OptionalTensor& weight_dot,
                          const OptionalTensor& bias_dot, const OptionalTensor& gate, bool train) {
  check_x(x);
  const Stack stack = check_stack(x_dot, "x_dot", x, "x");
  if (gate.has_value()) check_like(*gate, "gate", x);
  const Layout layout(x);
  const int64_t dims = x.dim(), size = x.numel();
  const Values values(x, mean, rstd, weight, weight_dot, bias_dot, stack);
  const Tensor at_x = layout.arranged(x, dims), at_x_dot = layout.arranged(x_dot, dims);
  const Tensor at_gate = gate.has_value() ? layout.arranged(*gate, dims) : Tensor();
  Tensor y_dot = layout.empty(x, dims, stack);
  if (size == 0) return y_dot;
  dispatch_image(x.scalar_type(), [&]<class T>() {
    for (int64_t k = 0; k < stack.value_or(1); ++k) {
      const BatchNormTangent<T> p{layout.shape,
                                  values.of(k),
                                  train,
                                  at_x.const_data_ptr<T>(),
                                  at_x_dot.const_data_ptr<T>() + k * size,
                                  data_or_null<T>(at_gate),
                                  y_dot.mutable_data_ptr<T>() + k * size};
      Device::channels(x, p, BLOKERN_KERNEL(blokern::batch_norm_tangent));
    }
  });
  return y_dot;
}

// What both of the adjoints' ops are: tangents undefined for the adjoint alone.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> adjoints(const Tensor& x, const Tensor& x_dot, const Tensor& grad,
                                                    const Tensor& grad_dot, const Values& values,
                                                    const OptionalTensor& gate, bool train, Stack stack,
                                                    bool adjoint) {
  if (gate.has_value()) check_like(*gate, "gate", x);
  const Layout layout(x);
  const int64_t dims = x.dim(), size = x.numel(), channels = x.size(1);
  const auto arranged = [&](const Tensor& t) { return t.defined() ? layout.arranged(t, dims) : Tensor(); };
  const Tensor at_x = arranged(x), at_x_dot = arranged(x_dot);
  const Tensor at_grad = arranged(grad), at_grad_dot = arranged(grad_dot);
  const Tensor at_gate = gate.has_value() ? arranged(*gate) : Tensor();
  const bool moves = grad_dot.defined();
  const int64_t vectors = stack.value_or(1);
  // Of a stack, each vector's kernel would compute the adjoint anew: the first does.
  Tensor x_bar = adjoint ? layout.empty(x, dims, moves ? std::nullopt : stack) : Tensor();
  Tensor x_bar_dot = moves ? layout.empty(x, dims, stack) : Tensor();
  std::vector<int64_t> bar_sizes{channels};
  if (stack.has_value()) bar_sizes.insert(bar_sizes.begin(), *stack);
  Tensor weight_bar = at::zeros(bar_sizes, x.options().dtype(at::kDouble)),
         bias_bar = at::zeros_like(weight_bar);
  if (size > 0) {
    dispatch_image(x.scalar_type(), [&]<class T>() {
      for (int64_t k = 0; k < vectors; ++k) {
        const int64_t at = k * size;
        const BatchNormAdjoint<T> p{layout.shape,
                                    values.of(k),
                                    train,
                                    at_x.const_data_ptr<T>(),
                                    moves ? at_x_dot.const_data_ptr<T>() + at : nullptr,
                                    at_grad.const_data_ptr<T>() + (moves ? 0 : at),
                                    moves ? at_grad_dot.const_data_ptr<T>() + at : nullptr,
                                    data_or_null<T>(at_gate),
                                    moves && k > 0 ? nullptr : mutable_or_null<T>(x_bar, moves ? 0 : at),
                                    mutable_or_null<T>(x_bar_dot, at),
                                    weight_bar.mutable_data_ptr<double>() + k * channels,
                                    bias_bar.mutable_data_ptr<double>() + k * channels};
        Device::channels(x, p, BLOKERN_KERNEL(blokern::batch_norm_adjoint));
      }
    });
  }
  return {x_bar, x_bar_dot, weight_bar, bias_bar};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> batch_norm_adjoint(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                      const Tensor& rstd, const OptionalTensor& weight,
                                                      const OptionalTensor& gate, bool train) {
  check_x(x);
  const Stack stack = check_stack(grad, "grad", x, "x");
  const Values values(x, mean, rstd, weight, {}, {}, {});
  const auto [x_bar, _, weight_bar, bias_bar] =
      adjoints<Device>(x, {}, grad, {}, values, gate, train, stack, true);
  return {x_bar, weight_bar, bias_bar};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_adjoint_tangent(
    const Tensor& grad, const Tensor& grad_dot, const Tensor& x, const Tensor& x_dot, const Tensor& mean,
    const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& weight_dot,
    const OptionalTensor& gate, bool train, bool adjoint) {
  check_x(x);
  check_like(grad, "grad", x);
  const Stack stack = check_tangents(grad_dot, x_dot, x, "x");
  const Values values(x, mean, rstd, weight, weight_dot, {}, stack);
  auto [x_bar, x_bar_dot, weight_bar, bias_bar] =
      adjoints<Device>(x, x_dot, grad, grad_dot, values, gate, train, stack, adjoint);
  if (!x_bar.defined()) x_bar = at::empty({0}, x.options());
  return {x_bar, x_bar_dot, weight_bar, bias_bar};
}

}  // namespace blokern::batch_norm_ops

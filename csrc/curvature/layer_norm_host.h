// Layer and group normalisation's derivatives on tensors of any device: checks. Arithmetic:
// layer_norm_<device>. Devices: register_<device>.cpp.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "curvature/layer_norm.h"
#include "curvature/stacks.h"
#include "support/dispatch.h"

namespace blokern::layer_norm_ops {

// The operands of a call as the kernels take them, checked.
class Operands {
 public:
  Operands(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
           const OptionalTensor& weight_dot, const OptionalTensor& bias_dot, Stack stack)
      : x_(x.contiguous()),
        stacked_(stack.has_value()),
        kinds_(checked_kinds(kinds_of(weight, weight_dot, bias_dot, stacked_))),
        mean_(rows(mean, "mean")),
        rstd_(rows(rstd, "rstd")),
        weight_(weights(weight, "weight", {})),
        weight_dot_(weights(weight_dot, "weight_dot", stack)),
        bias_dot_(weights(bias_dot, "bias_dot", stack)) {}

  template <class T>
  NormRows<T> of(int64_t vector) const {
    using A = Accum<T>;
    const auto data = [&](const Tensor& t, int64_t k) {
      return t.defined() ? t.const_data_ptr<A>() + k * kinds_ * x_.size(1) : nullptr;
    };
    return {x_.size(0),
            x_.size(1),
            kinds_,
            x_.const_data_ptr<T>(),
            mean_.const_data_ptr<double>(),
            rstd_.const_data_ptr<double>(),
            data(weight_, 0),
            data(weight_dot_, vector),
            data(bias_dot_, vector)};
  }
  int64_t kinds() const { return kinds_; }

 private:
  static int64_t kinds_of(const OptionalTensor& weight, const OptionalTensor& weight_dot,
                          const OptionalTensor& bias_dot, bool stacked) {
    if (weight.has_value() && weight->dim() == 2) return weight->size(0);
    for (const OptionalTensor& t : {weight_dot, bias_dot})
      if (t.has_value() && t->dim() == 2 + stacked) return t->size(stacked);
    return 1;
  }

  static int64_t checked_kinds(int64_t kinds) {
    TORCH_CHECK_VALUE(kinds > 0, "weight and its tangent must have at least one row, [kinds, D], got none");
    return kinds;
  }

  Tensor rows(const Tensor& t, const char* name) const {
    checks::same_device(t, name, x_, "x");
    TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == x_.size(0), name, " must have shape [", x_.size(0),
                      "], one value a row of x, got ", t.sizes());
    return t.to(at::kDouble).contiguous();
  }

  Tensor weights(const OptionalTensor& t, const char* name, Stack stack) const {
    if (!t.has_value()) return {};
    checks::same_device(*t, name, x_, "x");
    std::vector<int64_t> shape{kinds_, x_.size(1)};
    if (stack.has_value()) shape.insert(shape.begin(), *stack);
    TORCH_CHECK_VALUE(t->sizes() == at::IntArrayRef(shape), name, " must have shape ", at::IntArrayRef(shape),
                      ", got ", t->sizes());
    return t->to(x_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  }

  Tensor x_;
  bool stacked_;
  int64_t kinds_;
  Tensor mean_, rstd_, weight_, weight_dot_, bias_dot_;
};

inline void check_x(const Tensor& x) {
  checks::floating(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 2, "x must be [rows, size], got shape ", x.sizes());
}

template <class Device>
Tensor layer_norm_tangent(const Tensor& x, const Tensor& x_dot, const Tensor& mean, const Tensor& rstd,
                          const OptionalTensor& weight, const OptionalTensor& weight_dot,
                          const OptionalTensor& bias_dot) {
  check_x(x);
  const Stack stack = check_stack(x_dot, "x_dot", x, "x");
  const Operands operands(x, mean, rstd, weight, weight_dot, bias_dot, stack);
  const Tensor at_x_dot = x_dot.contiguous();
  Tensor y_dot = at::empty(x_dot.sizes(), x.options());
  dispatch_image(x.scalar_type(), [&]<class T>() {
    for (int64_t k = 0; k < stack.value_or(1); ++k) {
      const auto at = operands.of<T>(k);
      const int64_t offset = k * x.numel();
      const LayerNormTangent<T> p{at, at_x_dot.const_data_ptr<T>() + offset,
                                  y_dot.mutable_data_ptr<T>() + offset};
      Device::run(x, at.rows, at.size, p, BLOKERN_KERNEL(blokern::layer_norm_tangent));
    }
  });
  return y_dot;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_adjoint_tangent(
    const Tensor& grad, const Tensor& grad_dot, const Tensor& x, const Tensor& x_dot, const Tensor& mean,
    const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& weight_dot, bool adjoint) {
  check_x(x);
  checks::same_images(grad, "grad", x, "x");
  const Stack stack = check_tangents(grad_dot, x_dot, x, "x");
  const Operands operands(x, mean, rstd, weight, weight_dot, {}, stack);
  const Tensor at_grad = grad.contiguous(), at_grad_dot = grad_dot.contiguous(),
               at_x_dot = x_dot.contiguous();
  const int64_t blocks = Device::norm_blocks(x, operands.kinds()), vectors = stack.value_or(1);
  const auto sums = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const Tensor weight_bars = at::zeros({vectors, blocks, operands.kinds(), x.size(1)}, sums);
  const Tensor bias_bars = at::zeros(weight_bars.sizes(), sums);
  Tensor x_bar = adjoint ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  Tensor x_bar_dot = at::empty(x_dot.sizes(), x.options());
  dispatch_image(x.scalar_type(), [&]<class T>() {
    for (int64_t k = 0; k < vectors; ++k) {
      const auto at = operands.of<T>(k);
      using A = Accum<T>;
      const int64_t offset = k * x.numel(), block = k * weight_bars.stride(0);
      const LayerNormAdjointTangent<T> p{at,
                                         blocks,
                                         at_x_dot.const_data_ptr<T>() + offset,
                                         at_grad.const_data_ptr<T>(),
                                         at_grad_dot.const_data_ptr<T>() + offset,
                                         adjoint && k == 0 ? x_bar.mutable_data_ptr<T>() : nullptr,
                                         x_bar_dot.mutable_data_ptr<T>() + offset,
                                         weight_bars.mutable_data_ptr<A>() + block,
                                         bias_bars.mutable_data_ptr<A>() + block};
      Device::run(x, blocks, kNormBlock * at.size, p, BLOKERN_KERNEL(blokern::layer_norm_adjoint_tangent));
    }
  });
  const auto total = [&](const Tensor& bars) {
    const Tensor all = bars.sum(1, false, at::kDouble);
    return stack.has_value() ? all : all.squeeze(0);
  };
  return {x_bar, x_bar_dot, total(weight_bars), total(bias_bars)};
}

}  // namespace blokern::layer_norm_ops

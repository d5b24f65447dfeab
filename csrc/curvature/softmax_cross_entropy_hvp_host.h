// The losses' Hessian-vector products on tensors of any device: checks, layout. Arithmetic:
// softmax_cross_entropy_hvp_<device>. Devices: register_<device>.cpp.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "curvature/softmax_cross_entropy_hvp.h"
#include "curvature/stacks.h"
#include "support/dispatch.h"

namespace blokern::losses_ops {

template <class Device>
std::tuple<Tensor, Tensor, Tensor> softmax_cross_entropy_hvp(const Tensor& logits, const Tensor& tangent,
                                                             const Tensor& target,
                                                             const OptionalTensor& weight,
                                                             int64_t ignore_index, bool mean,
                                                             double label_smoothing) {
  checks::floating(logits, "logits");
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be [N, C], got shape ", logits.sizes());
  checks::same_images(tangent, "tangent", logits, "logits");
  checks::same_device(target, "target", logits, "logits");
  TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing must be in [0, 1], got ",
                    label_smoothing);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  TORCH_CHECK_VALUE(classes > 0 || rows == 0, "logits must have at least one class, got shape ",
                    logits.sizes());
  const bool soft = target.is_floating_point();
  if (soft) {
    checks::same_images(target, "target", logits, "logits");
  } else {
    TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target must be int64 labels or like logits, got ",
                     target.scalar_type());
    TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == rows, "target must have shape [", rows,
                      "], one label a row, got ", target.sizes());
  }
  Tensor wide_weight;
  if (weight.has_value()) {
    checks::same_device(*weight, "weight", logits, "logits");
    TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == classes, "weight must have shape [", classes,
                      "], one value a class, got ", weight->sizes());
    wide_weight = weight->to(at::kDouble).contiguous();
  }
  const Tensor z = logits.contiguous(), v = tangent.contiguous(), t = target.contiguous();
  // What a mean divides by, of labels: Σ w_y over those that count; checks them where it can.
  Tensor count;
  if (!soft)
    count = Device::label_weights(
        {t.const_data_ptr<int64_t>(), rows, classes,
         wide_weight.defined() ? wide_weight.const_data_ptr<double>() : nullptr, ignore_index},
        t);
  Tensor grad = at::empty_like(z), hvp = at::empty_like(z);
  const Tensor loss = at::empty({rows}, z.options().dtype(at::kDouble));
  dispatch_image(z.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    const Tensor w = wide_weight.defined() ? wide_weight.to(c10::CppTypeToScalarType<A>::value) : Tensor();
    const SoftmaxCrossEntropyHvp<T> p{rows,
                                      classes,
                                      z.const_data_ptr<T>(),
                                      v.const_data_ptr<T>(),
                                      soft ? t.const_data_ptr<T>() : nullptr,
                                      soft ? nullptr : t.const_data_ptr<int64_t>(),
                                      w.defined() ? w.const_data_ptr<A>() : nullptr,
                                      ignore_index,
                                      label_smoothing,
                                      mean && soft ? 1 / static_cast<double>(rows) : 1,
                                      mean && !soft ? count.const_data_ptr<double>() : nullptr,
                                      grad.mutable_data_ptr<T>(),
                                      hvp.mutable_data_ptr<T>(),
                                      loss.mutable_data_ptr<double>()};
    Device::run(z, rows, classes, p, BLOKERN_KERNEL(blokern::softmax_cross_entropy_hvp));
  });
  if (mean && rows == 0) {  // a mean over nothing, as in torch
    return {at::scalar_tensor(std::numeric_limits<double>::quiet_NaN(), z.options()), grad, hvp};
  }
  return {Device::sum(loss).to(z.scalar_type()), grad, hvp};
}

}  // namespace blokern::losses_ops

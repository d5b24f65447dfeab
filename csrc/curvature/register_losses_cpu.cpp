// The losses' Hessian-vector products on CPU tensors: checks, threads. Arithmetic:
// softmax_cross_entropy_hvp_cpu.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "curvature/softmax_cross_entropy_hvp.h"
#include "curvature/torch_cpu.h"
#include "support/dispatch.h"

namespace blokern {
namespace {

// Σ w_y over the labels that count; checks them all.
double label_weights(const Tensor& labels, int64_t classes, const Tensor& weight, int64_t ignore_index) {
  const int64_t* const label = labels.const_data_ptr<int64_t>();
  const double* const w = weight.defined() ? weight.const_data_ptr<double>() : nullptr;
  double total = 0;
  for (int64_t n = 0; n < labels.numel(); ++n) {
    if (label[n] == ignore_index) continue;
    TORCH_CHECK_VALUE(label[n] >= 0 && label[n] < classes, "target must be in [0, ", classes, "), or ",
                      ignore_index, " to be ignored, got ", label[n], " in row ", n);
    total += w != nullptr ? w[label[n]] : 1;
  }
  return total;
}

std::tuple<Tensor, Tensor, Tensor> softmax_cross_entropy_hvp_cpu(const Tensor& logits, const Tensor& tangent,
                                                                 const Tensor& target,
                                                                 const OptionalTensor& weight,
                                                                 int64_t ignore_index, bool mean,
                                                                 double label_smoothing) {
  checks::floating(logits, "logits");
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be [N, C], got shape ", logits.sizes());
  checks::same_images(tangent, "tangent", logits, "logits");
  checks::constant(logits, "logits");
  checks::constant(tangent, "tangent");
  checks::same_device(target, "target", logits, "logits");
  TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing must be in [0, 1], got ",
                    label_smoothing);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  TORCH_CHECK_VALUE(classes > 0 || rows == 0, "logits must have at least one class, got shape ",
                    logits.sizes());
  const bool soft = target.is_floating_point();
  if (soft) {
    checks::same_images(target, "target", logits, "logits");
    checks::constant(target, "target");
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
  const double count =
      soft ? static_cast<double>(rows) : label_weights(t, classes, wide_weight, ignore_index);
  Tensor grad = at::empty_like(z), hvp = at::empty_like(z);
  std::vector<double> loss(rows);
  dispatch_image(z.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    const Tensor w = wide_weight.defined() ? wide_weight.to(c10::CppTypeToScalarType<A>::value) : Tensor();
    const SoftmaxCrossEntropyHvp<T> p{classes,
                                      z.const_data_ptr<T>(),
                                      v.const_data_ptr<T>(),
                                      soft ? t.const_data_ptr<T>() : nullptr,
                                      soft ? nullptr : t.const_data_ptr<int64_t>(),
                                      w.defined() ? w.const_data_ptr<A>() : nullptr,
                                      ignore_index,
                                      label_smoothing,
                                      mean ? 1 / count : 1,
                                      grad.mutable_data_ptr<T>(),
                                      hvp.mutable_data_ptr<T>(),
                                      loss.data()};
    at::parallel_for(0, rows, grain(classes),
                     [&](int64_t b, int64_t e) { softmax_cross_entropy_hvp(p, b, e); });
  });
  double total = std::accumulate(loss.begin(), loss.end(), 0.0);
  if (mean && count == 0)
    total = std::numeric_limits<double>::quiet_NaN();  // a mean over nothing, as in torch
  return {at::scalar_tensor(total, z.options()), grad, hvp};
}

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) { m.impl("softmax_cross_entropy_hvp", softmax_cross_entropy_hvp_cpu); }

}  // namespace blokern

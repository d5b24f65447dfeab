// What the masked products are on tensors of any device: checks, layout, and torch's dense product.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include "checks.h"
#include "sparse/torch_ops.h"

namespace blokern::product_ops {

inline void check_matrix(const Tensor& t, const char* name) {
  checks::floating(t, name);
  TORCH_CHECK_VALUE(t.dim() == 2, name, " must be a matrix, got shape ", t.sizes());
}

inline void check_spmm(const Tensor& weight, const Tensor& x, const OptionalTensor& bias) {
  check_matrix(weight, "weight");
  check_matrix(x, "x");
  check_factor(x, "x", weight, "weight");
  const int64_t rows = weight.size(0), cols = weight.size(1);
  TORCH_CHECK_VALUE(x.size(0) == cols, "x must have ", cols, " features, one a column of weight, got ",
                    x.size(0));
  if (bias.has_value()) {
    check_factor(*bias, "bias", weight, "weight");
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == rows, "bias must have shape [", rows, "], got ",
                      bias->sizes());
  }
}

inline void check_sddmm(const Tensor& a, const Tensor& b) {
  check_matrix(a, "a");
  check_matrix(b, "b");
  check_factor(b, "b", a, "a");
  TORCH_CHECK_VALUE(a.size(1) == b.size(1), "b must have the samples of a, ", a.size(1), ", got ", b.size(1));
}

// The type in which products add up.
inline at::ScalarType sum_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// Of a weight [rows, ...] that is packed: one value an entry.
inline void check_packed(const Tensor& values, const Tensor& x, const OptionalTensor& bias,
                         const Tensor& start, const Tensor& column, int64_t rows) {
  check_matrix(x, "x");
  check_mask_device(x, start, column);
  if (bias.has_value()) {
    check_factor(*bias, "bias", x, "x");
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == rows, "bias must have shape [", rows, "], got ",
                      bias->sizes());
  }
  checks::same_device(values, "the weight", x, "x");
  TORCH_CHECK_TYPE(values.scalar_type() == sum_type(x.scalar_type()), "x must have the weight's dtype, got ",
                   x.scalar_type(), " and values of ", values.scalar_type());
  TORCH_CHECK_VALUE(values.is_contiguous() && values.numel() == column.numel(), "values must have ",
                    column.numel(), " elements, one an entry, got shape ", values.sizes());
}

// y [rows, samples] in x's layout: samples innermost, or (x is the transpose of a batch) rows innermost.
inline Tensor empty_product(int64_t rows, const Tensor& x) {
  const int64_t samples = x.size(1);
  if (x.stride(0) == 1 && x.stride(1) != 1) return at::empty_strided({rows, samples}, {1, rows}, x.options());
  return at::empty({rows, samples}, x.options());
}

// Y = W X + bias by torch, W being masked already, in X's layout.
inline Tensor dense_spmm(const Tensor& masked, const Tensor& x, const OptionalTensor& bias) {
  const NoAutocast guard(kAutocast);
  if (x.stride(0) == 1 && x.stride(1) != 1) return at::linear(x.t(), masked, bias).t();
  const Tensor y = at::mm(masked, x);
  return bias.has_value() ? y.add_(bias->unsqueeze(1)) : y;
}

}  // namespace blokern::product_ops

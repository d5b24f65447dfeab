// What the registrations of the curvature ops share, whatever the device: stacks of vectors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "checks.h"

namespace blokern {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Stack = std::optional<int64_t>;  // the number of vectors side by side; none for a single one

// t must be like `like`, or a stack of such.
inline Stack check_stack(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  const bool stacked = t.dim() == like.dim() + 1;
  TORCH_CHECK_VALUE(t.dim() == like.dim() + stacked && t.sizes().slice(stacked) == like.sizes(), name,
                    " must have the shape of ", like_name, ", ", like.sizes(),
                    ", or be a stack of such, got ", t.sizes());
  TORCH_CHECK_VALUE(!stacked || t.size(0) > 0, name, " must be a stack of at least one vector, got shape ",
                    t.sizes());
  checks::same_device(t, name, like, like_name);
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name, ", ",
                   like.scalar_type(), ", got ", t.scalar_type());
  return stacked ? Stack(t.size(0)) : std::nullopt;
}

// The tangents of one call are all single, or stacks of one size.
inline Stack check_tangents(const Tensor& grad_dot, const Tensor& x_dot, const Tensor& like,
                            const char* like_name) {
  const Stack stack = check_stack(x_dot, "x_dot", like, like_name);
  check_stack(grad_dot, "grad_dot", like, like_name);
  TORCH_CHECK_VALUE(grad_dot.sizes() == x_dot.sizes(), "grad_dot must have the shape of x_dot, ",
                    x_dot.sizes(), ", got ", grad_dot.sizes());
  return stack;
}

}  // namespace blokern

// What convolutions with a masked weight are on tensors of any device: the plan's numbers, checks, layouts,
// and torch's dense convolution.
#pragma once

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <initializer_list>

#include "checks.h"
#include "sparse/torch_ops.h"

namespace blokern::conv_ops {

// Kernels multiply such numbers as int64 and keep places as int32.
inline void check_range(at::IntArrayRef numbers, int64_t least, const char* name) {
  for (const int64_t number : numbers)
    TORCH_CHECK_VALUE(number >= least && number <= kMostIndices, name, " must be in [", least,
                      ", 2^31), got ", numbers);
}

inline int64_t checked_product(std::initializer_list<int64_t> sizes, const char* name) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    count *= size;
    check_range(count, 0, name);
  }
  return count;
}

// What every plan begins with: the output, and the channels of the input.
struct Sizes {
  int64_t rows, height, width, channels;

  explicit Sizes(at::IntArrayRef geometry) {
    TORCH_CHECK_VALUE(geometry.size() >= 4, "geometry must have at least 4 numbers, got ", geometry);
    check_range(geometry, 0, "geometry");
    rows = geometry[0];
    height = geometry[1];
    width = geometry[2];
    channels = geometry[3];
    TORCH_CHECK_VALUE(std::min(height, width) > 0, "geometry has an empty output: ", geometry);
  }
};

// What every plan ends with: stride, padding and dilation, two each, and groups; beside a weight's shape.
inline void check_numbers(at::IntArrayRef weight, at::IntArrayRef numbers) {
  TORCH_CHECK_VALUE(weight.size() == 4 && numbers.size() == 7,
                    "weight must be [out, in/groups, kh, kw], with 7 numbers, got ", weight, " and ",
                    numbers);
  check_range(weight, 0, "weight");
  check_range(numbers, 0, "numbers");
  TORCH_CHECK_VALUE(std::min({numbers[0], numbers[1], numbers[4], numbers[5], numbers[6]}) > 0,
                    "stride, dilation and groups must be at least 1, got numbers ", numbers);
}

inline void check_images(const Tensor& x, const char* name, int64_t channels) {
  checks::floating(x, name);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) == channels, name, " must be [N, ", channels, ", H, W], got ",
                    x.sizes());
}

inline bool is_batch_innermost(const Tensor& x) { return x.stride(0) == 1 && x.size(0) > 1; }

inline void check_weight(const Tensor& weight, const Tensor& x) {
  checks::floating(weight, "weight");
  check_factor(weight, "weight", x, "x");
}

inline void check_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                              const Sizes& g) {
  check_images(x, "x", g.channels);
  check_weight(weight, x);
  if (bias.has_value()) {
    check_factor(*bias, "bias", x, "x");
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == g.rows, "bias must have shape [", g.rows,
                      "], got ", bias->sizes());
  }
}

inline void check_weight_gradient(const Tensor& grad, const Tensor& x, const Sizes& g) {
  check_images(x, "x", g.channels);
  check_images(grad, "grad", g.rows);
  check_factor(grad, "grad", x, "x");
  TORCH_CHECK_VALUE(grad.size(0) == x.size(0) && grad.size(2) == g.height && grad.size(3) == g.width,
                    "grad must be [", x.size(0), ", ", g.rows, ", ", g.height, ", ", g.width, "], got ",
                    grad.sizes());
}

inline void check_plan(const Tensor& like, at::TensorList streams, at::TensorList streams_t,
                       const Tensor& words) {
  check_mask_device(like, words);
  for (const Tensor& part : streams) check_mask_device(like, part);
  for (const Tensor& part : streams_t) check_mask_device(like, part);
}

// A convolution as torch takes it, for masks that keep so much that the dense product is faster.
struct DenseConv {
  at::IntArrayRef stride, before, dilation;
  int64_t groups;

  explicit DenseConv(at::IntArrayRef numbers)
      : stride(numbers.slice(0, 2)),
        before(numbers.slice(2, 2)),
        dilation(numbers.slice(4, 2)),
        groups(numbers[6]) {}

  Tensor forward(const Tensor& x, at::IntArrayRef out, const Tensor& weight,
                 const OptionalTensor& bias) const {
    const NoAutocast guard(kAutocast);
    check(x.sizes(), out, weight.sizes());
    return at::convolution(padded(x, out, weight.sizes()), weight, bias, stride, before, dilation, false,
                           zeros(), groups);
  }

  Tensor by_input(const Tensor& grad, at::IntArrayRef size, const Tensor& weight) const {
    const NoAutocast guard(kAutocast);
    check(size, grad.sizes(), weight.sizes());
    const auto [rows, cols] = more(size, grad.sizes(), weight.sizes());
    const Tensor x = at::empty({size[0], size[1], size[2] + rows, size[3] + cols}, grad.options());
    const Tensor product = std::get<0>(backward(grad, x, weight, {true, false, false}));
    return product.narrow(2, 0, size[2]).narrow(3, 0, size[3]);
  }

  Tensor by_weight(const Tensor& grad, const Tensor& x, at::IntArrayRef weight) const {
    const NoAutocast guard(kAutocast);
    check(x.sizes(), grad.sizes(), weight);
    const Tensor like = at::empty(weight, x.options());
    return std::get<1>(backward(grad, padded(x, grad.sizes(), weight), like, {false, true, false}));
  }

 private:
  static std::array<int64_t, 2> zeros() { return {0, 0}; }

  // Torch trusts the shapes of a backward pass.
  void check(at::IntArrayRef size, at::IntArrayRef out, at::IntArrayRef weight) const {
    bool fits = size[1] == weight[1] * groups && out[1] == weight[0] && weight[0] % groups == 0;
    for (int i = 0; i < 2; ++i)
      fits &= size[2 + i] + 2 * before[i] < out[2 + i] * stride[i] + dilation[i] * (weight[2 + i] - 1) + 1;
    TORCH_CHECK_VALUE(fits, "a convolution of images ", size, " by weight ", weight, ", stride ", stride,
                      ", padding ", before, ", dilation ", dilation, " and ", groups,
                      " groups does not give ", out);
  }

  // Padding to the "same" size may be longer at the end: rows and columns that outputs read beyond the
  // padding on both sides.
  std::array<int64_t, 2> more(at::IntArrayRef size, at::IntArrayRef out, at::IntArrayRef weight) const {
    std::array<int64_t, 2> more{};
    for (int i = 0; i < 2; ++i) {
      const int64_t read = (out[2 + i] - 1) * stride[i] + dilation[i] * (weight[2 + i] - 1) + 1;
      more[i] = std::max<int64_t>(0, read - size[2 + i] - 2 * before[i]);
    }
    return more;
  }

  Tensor padded(const Tensor& x, at::IntArrayRef out, at::IntArrayRef weight) const {
    const auto [rows, cols] = more(x.sizes(), out, weight);
    return rows + cols == 0 ? x : at::constant_pad_nd(x, std::array<int64_t, 4>{0, cols, 0, rows});
  }

  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                              std::array<bool, 3> wanted) const {
    return at::convolution_backward(grad, x, weight, at::OptionalIntArrayRef(), stride, before, dilation,
                                    false, zeros(), groups, wanted);
  }
};

// A convolution of no channels: y becomes its bias.
inline Tensor fill_with_bias(const Tensor& y, const OptionalTensor& bias) {
  return bias.has_value() ? y.copy_(bias->view({-1, 1, 1})) : y.zero_();
}

// y in the layout that every device gives it: x's where its samples are innermost, else contiguous.
inline Tensor laid_out(const Tensor& y, const Tensor& x) {
  return is_batch_innermost(x) ? y.permute({1, 2, 3, 0}).contiguous().permute({3, 0, 1, 2}) : y.contiguous();
}

}  // namespace blokern::conv_ops

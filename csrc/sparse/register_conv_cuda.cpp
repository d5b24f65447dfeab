// Convolutions with a masked weight on CUDA tensors: cuDNN's, by torch, of a weight that apply_mask_cuda.cuh
// masks. Its tensor cores outrun products by entries until nearly nothing is left, and compaction serves what
// whole channels leave. A plan has no streams here.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "sparse/products_cuda.h"
#include "sparse/register_conv.h"
#include "sparse/torch_cuda.h"

namespace blokern {
namespace {

using namespace conv_ops;

// y in the layout that blokern/ops/convolution.py promises: x's, where that is one of torch's.
Tensor laid_out_like(const Tensor& x, const Tensor& y) {
  const bool channels_last = x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
  return channels_last ? y.contiguous(at::MemoryFormat::ChannelsLast) : laid_out(y, x);
}

Tensor masked_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     at::TensorList streams, at::TensorList streams_t, at::IntArrayRef geometry,
                     at::IntArrayRef, at::IntArrayRef numbers, const Tensor& words, bool /*dense_grad*/) {
  const Sizes g(geometry);
  check_convolution(x, weight, bias, g);
  check_plan(x, streams, streams_t, words);
  check_numbers(weight.sizes(), numbers);
  const std::array<int64_t, 4> out{x.size(0), g.rows, g.height, g.width};
  if (weight.numel() == 0) return laid_out_like(x, fill_with_bias(at::empty(out, x.options()), bias));
  return laid_out_like(x, DenseConv(numbers).forward(x, out, masked_weight<Cuda>(weight, words), bias));
}

Tensor masked_conv2d_input(const Tensor& grad, const Tensor& weight, at::TensorList streams,
                           at::TensorList streams_t, at::IntArrayRef, at::IntArrayRef geometry,
                           at::IntArrayRef numbers, const Tensor& words, bool /*dense_grad*/) {
  const Sizes g(geometry);
  check_images(grad, "grad", g.channels);
  check_weight(weight, grad);
  check_plan(grad, streams, streams_t, words);
  check_numbers(weight.sizes(), numbers);
  const std::array<int64_t, 4> size{grad.size(0), g.rows, g.height, g.width};
  if (weight.numel() == 0) return laid_out_like(grad, at::zeros(size, grad.options()));
  return laid_out_like(grad, DenseConv(numbers).by_input(grad, size, masked_weight<Cuda>(weight, words)));
}

Tensor conv2d_weight(const Tensor& grad, const Tensor& x, at::IntArrayRef geometry,
                     at::IntArrayRef weight_shape, at::IntArrayRef numbers) {
  check_weight_gradient(grad, x, Sizes(geometry));
  check_numbers(weight_shape, numbers);
  if (x.size(0) == 0 || c10::multiply_integers(weight_shape) == 0)
    return at::zeros(weight_shape, x.options());
  return DenseConv(numbers).by_weight(grad, x, weight_shape).contiguous();
}

Tensor masked_conv2d_weight(const Tensor& grad, const Tensor& x, at::TensorList streams,
                            at::TensorList streams_t, at::IntArrayRef geometry, at::IntArrayRef,
                            at::IntArrayRef numbers, const Tensor& words, at::IntArrayRef weight_shape) {
  check_plan(x, streams, streams_t, words);
  Tensor product = conv2d_weight(grad, x, geometry, weight_shape, numbers);
  if (product.numel() == 0) return product;
  const MaskWords mask = words_of(words, product.size(0), product.numel() / product.size(0));
  dispatch(x.scalar_type(), [&]<class T>() {
    Cuda::run(x, 0, 0,
              [&](const CudaCall& call) { clear_masked(mask, product.mutable_data_ptr<T>(), call); });
  });
  return product;
}

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CUDA, m) {
  m.impl("masked_conv2d", masked_conv2d);
  m.impl("masked_conv2d_input", masked_conv2d_input);
  m.impl("masked_conv2d_weight", masked_conv2d_weight);
  m.impl("conv2d_weight", conv2d_weight);
}

}  // namespace blokern

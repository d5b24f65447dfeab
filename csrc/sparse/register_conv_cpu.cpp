// Convolutions with a masked weight on CPU tensors: checks, layouts, threads. Arithmetic: conv_cpu.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "sparse/conv.h"
#include "sparse/torch_cpu.h"

namespace blokern {
namespace {

// What blokern/ops/convolution.py says of a convolution, or of its gradient by the input, which is one too.
struct Geometry {
  int64_t channels;                   // of the input
  int64_t rows, height, width;        // of the output
  int64_t top, left;                  // zeros before each plane
  int64_t plane_height, plane_width;  // with zeros
  c10::ArrayRef<int64_t> rest;        // kPiece numbers for each piece of the output

  // The output positions with a stream of their own: all, or those with equal remainders by the stride.
  struct Piece {
    int64_t block, origin_h, origin_w, stride_h, stride_w, height, width, step_h, step_w;
  };
  static constexpr int64_t kHead = 8, kPiece = 9;

  explicit Geometry(c10::ArrayRef<int64_t> g)
      : channels(g[0]),
        rows(g[1]),
        height(g[2]),
        width(g[3]),
        top(g[4]),
        left(g[5]),
        plane_height(g[6]),
        plane_width(g[7]),
        rest(g.slice(kHead)) {}

  size_t pieces() const { return rest.size() / kPiece; }
  Piece piece(size_t i) const {
    const int64_t* const p = rest.data() + kPiece * i;
    return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8]};
  }
  Planes planes() const { return {channels, plane_height, plane_width}; }
};

void check_images(const Tensor& x, const char* name, int64_t channels) {
  check_float(x, name);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) == channels, name, " must be [N, ", channels, ", H, W], got ",
                    x.sizes());
}

bool is_batch_innermost(const Tensor& x) { return x.stride(0) == 1 && x.size(0) > 1; }

// Planes whose rows follow one another, in whatever order the other dimensions lie.
Tensor with_flat_planes(const Tensor& x) {
  return x.size(2) == 1 || x.stride(2) == x.size(3) * x.stride(3) ? x : x.contiguous();
}

template <class T, int kSlot>
const Accum<T>* packed_planes(const Tensor& images, const Planes& planes, int64_t top, int64_t left) {
  using A = Accum<T>;
  const Tensor x = with_flat_planes(images);
  const int64_t samples = x.size(0);
  A* const panels = scratch<A, kSlot>(planes.size() * padded<A>(samples));
  const Images<const T> from{x.const_data_ptr<T>(), x.stride(0), x.stride(1),
                             x.stride(3),           x.size(2),   x.size(3)};
  at::parallel_for(
      0, planes.channels, grain(planes.height * planes.width * samples),
      [&](int64_t b, int64_t e) { pack_planes<T>(from, planes, top, left, samples, panels, b, e); });
  return panels;
}

// Values in the stream's order; `source` is the entries' places in the weight.
template <class T>
const Accum<T>* gathered(const Stream& stream, const Tensor& source, const Tensor& weight) {
  using A = Accum<T>;
  A* const values = scratch<A, kValues>(source.numel());
  Stream places = stream;
  places.column = source.const_data_ptr<int32_t>();
  over_rows(stream, 1, [&](int64_t b, int64_t e) {
    gather_values<T>(places, {weight.const_data_ptr<T>(), 0, 1}, values, b, e);
  });
  return values;
}

Stream piece_stream(at::TensorList streams, size_t piece, int64_t rows, int64_t cols, int64_t block) {
  return stream_of(streams[3 * piece], streams[3 * piece + 2], rows, cols, block);
}

// streams: start, source and offset of each piece. cols: of the weight as a matrix, for its blocks.
Tensor correlate(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::TensorList streams,
                 const Geometry& g, int64_t cols) {
  const int64_t samples = x.size(0);
  const std::vector<int64_t> sizes{samples, g.rows, g.height, g.width};
  const int64_t pixel = samples, row = g.height * g.width * samples;
  // Samples innermost, as the kernels write it.
  Tensor y = at::empty_strided(sizes, {1, row, g.width * pixel, pixel}, x.options());
  const bool keep = is_batch_innermost(x);
  Tensor result = keep ? y : at::empty(sizes, x.options());
  if (y.numel() == 0) return result;
  const Tensor dense = weight.contiguous(), offsets = bias.has_value() ? bias->contiguous() : Tensor();
  dispatch(x.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    const A* const panels = packed_planes<T, kFactor>(x, g.planes(), g.top, g.left);
    for (size_t i = 0; i < g.pieces(); ++i) {
      const Geometry::Piece p = g.piece(i);
      const Stream stream = piece_stream(streams, i, g.rows, cols, p.block);
      const A* const values = gathered<T>(stream, streams[3 * i + 1], dense);
      const Placement<T> place{p.height,
                               p.width,
                               p.step_h,
                               p.step_w,
                               y.mutable_data_ptr<T>() + (p.origin_h * g.width + p.origin_w) * pixel,
                               row,
                               p.stride_h * g.width * pixel,
                               p.stride_w * pixel};
      int64_t panel_count = 0;
      for_each_panel<A>(samples, [&](int64_t, int64_t) { ++panel_count; });
      const int64_t work = 1 + kept_entries(stream) * p.width * samples / panel_count;
      at::parallel_for(0, panel_count * p.height, grain(work), [&](int64_t b, int64_t e) {
        convolve<T>(stream, values, panels, g.planes().size(),
                    offsets.defined() ? offsets.const_data_ptr<T>() : nullptr, place, samples, b, e);
      });
    }
    if (keep) return;
    const int64_t features = g.rows * g.height * g.width;
    const Matrix<const T> from{y.const_data_ptr<T>(), samples, 1};
    const Matrix<T> to{result.mutable_data_ptr<T>(), 1, features};
    at::parallel_for(0, features, std::max<int64_t>(64, grain(samples)),
                     [&](int64_t b, int64_t e) { copy_matrix<T>(from, to, samples, b, e); });
  });
  return result;
}

void check_weight(const Tensor& weight, const Tensor& x) {
  check_float(weight, "weight");
  check_factor(weight, "weight", x, "x");
}

Tensor masked_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     at::TensorList streams, at::TensorList, at::IntArrayRef geometry, at::IntArrayRef,
                     at::OptionalIntArrayRef /*dense_grad*/) {
  const Geometry g(geometry);
  check_images(x, "x", g.channels);
  check_weight(weight, x);
  if (bias.has_value()) {
    check_factor(*bias, "bias", x, "x");
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == g.rows, "bias must have shape [", g.rows,
                      "], got ", bias->sizes());
  }
  return correlate(x, weight, bias, streams, g, weight[0].numel());
}

Tensor masked_conv2d_input(const Tensor& grad, const Tensor& weight, at::TensorList, at::TensorList streams,
                           at::IntArrayRef, at::IntArrayRef geometry,
                           at::OptionalIntArrayRef /*dense_grad*/) {
  const Geometry g(geometry);
  check_images(grad, "grad", g.channels);
  check_weight(weight, grad);
  return correlate(grad, weight, {}, streams, g, weight.numel() / g.rows);
}

Tensor masked_conv2d_weight(const Tensor& grad, const Tensor& x, at::TensorList streams, at::TensorList,
                            at::IntArrayRef geometry, at::IntArrayRef, at::IntArrayRef weight_shape) {
  const Geometry g(geometry);
  check_images(x, "x", g.channels);
  check_images(grad, "grad", g.rows);
  check_factor(grad, "grad", x, "x");
  Tensor product = at::empty(weight_shape, x.options()).zero_();
  if (x.size(0) == 0) return product;
  const Geometry::Piece p = g.piece(0);
  const Stream stream = piece_stream(streams, 0, g.rows, product.numel() / g.rows, p.block);
  dispatch(x.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    const int64_t samples = x.size(0);
    const A* const panels = packed_planes<T, kFactor>(x, g.planes(), g.top, g.left);
    const A* const grad_panels = packed_planes<T, kOtherFactor>(grad, {g.rows, g.height, g.width}, 0, 0);
    A* const value = scratch<A, kValues>(streams[1].numel());
    Stream places = stream;
    places.column = streams[1].const_data_ptr<int32_t>();
    over_rows(stream, samples * g.height * g.width, [&](int64_t b, int64_t e) {
      convolve_weight<A>(stream, grad_panels, panels, g.planes().size(), g.height, g.width, p.step_h,
                         p.step_w, value, samples, b, e);
      scatter_values<T>(places, value, {product.mutable_data_ptr<T>(), 0, 1}, b, e);
    });
  });
  return product;
}

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) {
  m.impl("masked_conv2d", masked_conv2d);
  m.impl("masked_conv2d_input", masked_conv2d_input);
  m.impl("masked_conv2d_weight", masked_conv2d_weight);
}

}  // namespace blokern

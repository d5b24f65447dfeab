// Convolutions with a masked weight on CPU tensors: checks, layouts, threads. Arithmetic: conv_cpu.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "checks.h"
#include "sparse/conv.h"
#include "sparse/conv_entries.h"
#include "sparse/torch_cpu.h"

namespace blokern {
namespace {

// What blokern/ops/convolution.py says of a convolution, or of its gradient by the input, which is one too.
struct Geometry {
  int64_t rows, height, width;  // of the output
  Tiling tiling;                // of the input
  c10::ArrayRef<int64_t> rest;  // kPiece numbers for each piece of the output

  // The output positions with a stream of their own: all, or those with equal remainders by the stride.
  struct Positions {
    int64_t block, origin_h, origin_w, stride_h, stride_w, height, width, step;
  };
  static constexpr int64_t kHead = 10, kPiece = 8;

  explicit Geometry(c10::ArrayRef<int64_t> g)
      : rows(g[0]),
        height(g[1]),
        width(g[2]),
        tiling{g[3], g[4], g[5], g[6], g[7], g[8], g[9]},
        rest(g.slice(kHead)) {}

  size_t pieces() const { return rest.size() / kPiece; }
  Positions piece(size_t i) const {
    const int64_t* const p = rest.data() + kPiece * i;
    return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
  }
};

void check_images(const Tensor& x, const char* name, int64_t channels) {
  check_float(x, name);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) == channels, name, " must be [N, ", channels, ", H, W], got ",
                    x.sizes());
}

constexpr int64_t kPackedBytes = 16 << 20;

bool is_batch_innermost(const Tensor& x) { return x.stride(0) == 1 && x.size(0) > 1; }

// A layout in which the rows of a plane follow one another, and samples or pixels are innermost.
Tensor tileable(const Tensor& x) {
  const bool flat = x.size(2) == 1 || x.stride(2) == x.size(3) * x.stride(3);
  return flat && (is_batch_innermost(x) || x.stride(3) == 1) ? x : x.contiguous();
}

template <class T>
Images<const T> images(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(3), x.size(2), x.size(3)};
}

// Values in the stream's order; `source` is the entries' places in the weight.
template <class T>
void gather(const Stream& stream, const Tensor& source, const Tensor& weight, Accum<T>* values) {
  Stream places = stream;
  places.column = source.const_data_ptr<int32_t>();
  over_rows(stream, 1, [&](int64_t b, int64_t e) {
    gather_values<T>(places, {weight.const_data_ptr<T>(), 0, 1}, values, b, e);
  });
}

Stream piece_stream(at::TensorList streams, size_t piece, int64_t rows, int64_t cols, int64_t block) {
  return stream_of(streams[3 * piece], streams[3 * piece + 2], rows, cols, block);
}

std::tuple<Tensor, Tensor, Tensor> conv2d_entries(const Tensor& words, at::IntArrayRef weight, int64_t groups,
                                                  at::IntArrayRef place, int64_t plane, int64_t block,
                                                  bool transposed) {
  TORCH_CHECK_VALUE(weight.size() == 3 && groups > 0 && weight[0] % groups == 0 && block > 0 &&
                        static_cast<int64_t>(place.size()) == weight[2],
                    "weight must be [rows, own, taps] with a place for each tap, got ", weight, " and ",
                    place);
  const MaskWords mask = words_of(words, weight[1] * weight[2]);
  TORCH_CHECK_VALUE(mask.rows == weight[0], "words must have ", weight[0], " rows, got ", words.sizes());
  const ConvEntries entries{groups, weight[1], weight[2], place.data(), plane, block, transposed};
  const int64_t rows = stream_rows(mask, entries), cols = stream_cols(mask, entries);
  const int64_t parts = (cols + block - 1) / block * rows;
  const int64_t shared = transposed ? entries.own : mask.rows,
                work = grain(mask.rows * mask.cols / std::max<int64_t>(1, shared));
  Tensor start = at::empty({parts + 1}, words.options().dtype(at::kInt)).zero_();
  int32_t* const starts = start.mutable_data_ptr<int32_t>();
  at::parallel_for(0, shared, work,
                   [&](int64_t b, int64_t e) { count_entries(mask, entries, starts, b, e); });
  std::partial_sum(starts, starts + parts + 1, starts);
  Tensor source = at::empty({starts[parts]}, start.options()),
         offset = at::empty({starts[parts]}, start.options());
  at::parallel_for(0, shared, work, [&](int64_t b, int64_t e) {
    fill_entries(mask, entries, starts, source.mutable_data_ptr<int32_t>(),
                 offset.mutable_data_ptr<int32_t>(), b, e);
  });
  return {start, source, offset};
}

// streams: start, source and offset of each piece. cols: of the weight as a matrix, for its blocks.
Tensor correlate(const Tensor& images_in, const Tensor& weight, const OptionalTensor& bias,
                 at::TensorList streams, const Geometry& g, int64_t cols) {
  const Tensor x = tileable(images_in);
  const int64_t samples = x.size(0);
  const std::vector<int64_t> sizes{samples, g.rows, g.height, g.width};
  const int64_t row = g.width * samples;
  Tensor y = is_batch_innermost(x) ? at::empty_strided(sizes, {1, g.height * row, row, samples}, x.options())
                                   : at::empty(sizes, x.options());
  if (y.numel() == 0) return y;
  const Tensor dense = weight.contiguous(), offsets = bias.has_value() ? bias->contiguous() : Tensor();
  dispatch(x.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    std::vector<Piece<T>> pieces;
    int64_t entries = 0;
    for (size_t i = 0; i < g.pieces(); ++i) entries += streams[3 * i + 1].numel();
    A* values = scratch<A, kValues>(entries);
    for (size_t i = 0; i < g.pieces(); ++i) {
      const Geometry::Positions p = g.piece(i);
      const Stream stream = piece_stream(streams, i, g.rows, cols, p.block);
      gather<T>(stream, streams[3 * i + 1], dense, values);
      pieces.push_back({stream, values, p.height, p.width, p.step, p.origin_h * g.width + p.origin_w,
                        p.stride_h * g.width, p.stride_w});
      values += kept_entries(stream);
    }
    const Images<T> out{y.mutable_data_ptr<T>(), y.stride(0), y.stride(1), y.stride(3), g.height, g.width};
    const int64_t tiles = count_tiles<A>(g.tiling, pieces[0].height, samples);
    const int64_t work = (g.rows + entries) * g.height * g.width * samples / tiles;
    at::parallel_for(0, tiles, grain(work), [&](int64_t b, int64_t e) {
      convolve<T>(images<T>(x), g.tiling, pieces, offsets.defined() ? offsets.const_data_ptr<T>() : nullptr,
                  out, samples, b, e);
    });
  });
  return y;
}

void check_weight(const Tensor& weight, const Tensor& x) {
  check_float(weight, "weight");
  check_factor(weight, "weight", x, "x");
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
    return at::convolution(padded(x, out, weight.sizes()), weight, bias, stride, before, dilation, false,
                           zeros(), groups);
  }

  Tensor by_input(const Tensor& grad, at::IntArrayRef size, const Tensor& weight) const {
    const NoAutocast guard(kAutocast);
    const auto [rows, cols] = more(size, grad.sizes(), weight.sizes());
    const Tensor x = at::empty({size[0], size[1], size[2] + rows, size[3] + cols}, grad.options());
    const Tensor product = std::get<0>(backward(grad, x, weight, {true, false, false}));
    return product.narrow(2, 0, size[2]).narrow(3, 0, size[3]);
  }

  Tensor by_weight(const Tensor& grad, const Tensor& x, at::IntArrayRef weight) const {
    const NoAutocast guard(kAutocast);
    const Tensor like = at::empty(weight, x.options());
    return std::get<1>(backward(grad, padded(x, grad.sizes(), weight), like, {false, true, false}));
  }

 private:
  static std::array<int64_t, 2> zeros() { return {0, 0}; }

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

// Whether the dense product is faster: measured at ResNet-18's layers. Torch copies samples-innermost tensors
// first, and ours idles where a batch does not fill its lanes.
bool dense_pays(const Tensor& weight, int64_t kept, const Tensor& x, int64_t positions, double limit) {
  const int64_t samples = x.size(0);
  const int64_t lanes = samples > kNarrowLanes<float> ? kConvLanes<float> : kNarrowLanes<float>;
  const double used =
      static_cast<double>(samples) / static_cast<double>((samples + lanes - 1) / lanes * lanes);
  return may_be_dense(weight, positions * samples) &&
         static_cast<double>(kept) > limit * used * static_cast<double>(weight.numel());
}

constexpr double kDenseInnermost = 0.6, kDenseElse = 0.3, kDenseStridedInput = 0.1;

// y in the layout that the kernels give it: x's.
Tensor laid_out(const Tensor& y, const Tensor& x) {
  return is_batch_innermost(x) ? y.permute({1, 2, 3, 0}).contiguous().permute({3, 0, 1, 2}) : y.contiguous();
}

Tensor masked_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     at::TensorList streams, at::TensorList, at::IntArrayRef geometry, at::IntArrayRef,
                     at::IntArrayRef numbers, const Tensor& words, bool /*dense_grad*/) {
  const Geometry g(geometry);
  check_images(x, "x", g.tiling.channels);
  check_weight(weight, x);
  if (bias.has_value()) {
    check_factor(*bias, "bias", x, "x");
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == g.rows, "bias must have shape [", g.rows,
                      "], got ", bias->sizes());
  }
  const double limit = is_batch_innermost(x) ? kDenseInnermost : kDenseElse;
  if (dense_pays(weight, streams[1].numel(), x, g.height * g.width, limit)) {
    const std::array<int64_t, 4> out{x.size(0), g.rows, g.height, g.width};
    return laid_out(DenseConv(numbers).forward(x, out, masked_weight(weight, words), bias), x);
  }
  return correlate(x, weight, bias, streams, g, weight[0].numel());
}

Tensor masked_conv2d_input(const Tensor& grad, const Tensor& weight, at::TensorList, at::TensorList streams,
                           at::IntArrayRef, at::IntArrayRef geometry, at::IntArrayRef numbers,
                           const Tensor& words, bool /*dense_grad*/) {
  const Geometry g(geometry);
  check_images(grad, "grad", g.tiling.channels);
  check_weight(weight, grad);
  int64_t kept = 0;
  for (size_t i = 0; i < g.pieces(); ++i) kept += streams[3 * i + 1].numel();
  const bool strided = g.pieces() > 1;
  const double limit = is_batch_innermost(grad) ? kDenseInnermost : strided ? kDenseStridedInput : kDenseElse;
  if (dense_pays(weight, kept, grad, grad.size(2) * grad.size(3), limit)) {
    const std::array<int64_t, 4> size{grad.size(0), g.rows, g.height, g.width};
    return laid_out(DenseConv(numbers).by_input(grad, size, masked_weight(weight, words)), grad);
  }
  return correlate(grad, weight, {}, streams, g, weight.numel() / g.rows);
}

// A tile of the output's gradient and that of the input, packed.
template <class A>
struct TilePair {
  const A *grad, *x;
  Part part;
  bool first;  // of the batch
};

// body(pairs, their share of all) for as many tiles at a time as the last-level cache holds: threads share
// the packing, then the rows.
template <class T, class Body>
void for_each_pairs(const Tensor& grad, const Tensor& x, const Geometry& g, const Tiling& out, Body&& body) {
  using A = Accum<T>;
  const Tensor inputs = tileable(x), grads = tileable(grad);
  const int64_t samples = x.size(0), tiles = count_tiles<A>(g.tiling, g.height, samples);
  const int64_t out_size = out.channels * out.plane() * kConvLanes<A>;
  const int64_t size = out_size + g.tiling.channels * g.tiling.plane() * kConvLanes<A>;
  const int64_t group = std::clamp<int64_t>(kPackedBytes / (size * sizeof(A)), 1, tiles);
  A* const packed = scratch<A, kFactor>(group * size);
  std::vector<TilePair<A>> pairs;
  for (int64_t first = 0; first < tiles; first += group) {
    const int64_t last = std::min(first + group, tiles), channels = g.rows + g.tiling.channels;
    pairs.clear();
    for (int64_t tile = first; tile < last; ++tile) {
      const A* const to = packed + (tile - first) * size;
      pairs.push_back({to, to + out_size, part_of<A>(g.tiling, g.height, samples, tile), tile == 0});
    }
    at::parallel_for(0, (last - first) * channels, grain(size / channels), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t tile = i / channels, channel = i % channels, c = channel - g.rows;
        A* const to = packed + tile * size;
        if (c < 0)
          pack_tile<T>(images<T>(grads), out, pairs[tile].part, to, channel, channel + 1);
        else
          pack_tile<T>(images<T>(inputs), g.tiling, pairs[tile].part, to + out_size, c, c + 1);
      }
    });
    body(pairs, samples * g.height * g.width * (last - first) / tiles);
  }
}

void check_weight_gradient(const Tensor& grad, const Tensor& x, const Geometry& g) {
  check_images(x, "x", g.tiling.channels);
  check_images(grad, "grad", g.rows);
  check_factor(grad, "grad", x, "x");
}

// The tiling of the output's gradient.
Tiling output_tiling(const Geometry& g) {
  return {g.rows, 0, 0, g.tiling.height, g.width, g.tiling.height, 1};
}

Tensor conv2d_weight(const Tensor& grad, const Tensor& x, at::IntArrayRef geometry,
                     at::IntArrayRef weight_shape, at::IntArrayRef numbers) {
  const Geometry g(geometry);
  check_weight_gradient(grad, x, g);
  Tensor product = at::empty(weight_shape, x.options());
  if (x.size(0) == 0 || product.numel() == 0) return product.zero_();
  // Torch would copy samples-innermost factors first.
  if (!is_batch_innermost(x)) return DenseConv(numbers).by_weight(grad, x, weight_shape);
  const at::IntArrayRef dilation = DenseConv(numbers).dilation;
  const int64_t own = weight_shape[1], cols = product.numel() / g.rows;
  const int64_t groups = g.tiling.channels / own, filters = g.rows / groups;
  std::vector<int32_t> offset;
  for (int64_t c = 0; c < own; ++c) {
    for (int64_t h = 0; h < weight_shape[2]; ++h) {
      for (int64_t w = 0; w < weight_shape[3]; ++w)
        offset.push_back(c * g.tiling.plane() + h * dilation[0] * g.tiling.width + w * dilation[1]);
    }
  }
  const Tiling out = output_tiling(g);
  dispatch(x.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    A* const values = scratch<A, kValues>(product.numel());
    for_each_pairs<T>(grad, x, g, out, [&](const std::vector<TilePair<A>>& pairs, int64_t work) {
      // Rows are shared out in fours, as the kernel takes them.
      at::parallel_for(0, groups * ((filters + 3) / 4), grain(4 * cols * work), [&](int64_t b, int64_t e) {
        const int64_t fours = (filters + 3) / 4;
        for (const TilePair<A>& pair : pairs) {
          for (int64_t i = b; i < e;) {
            const int64_t group = i / fours, last = std::min(e, (group + 1) * fours) - group * fours;
            const int64_t row = group * filters, begin = 4 * (i - group * fours);
            convolve_dense_weight<A>(offset.data(), cols, pair.grad + row * out.plane() * pair.part.lanes,
                                     out, pair.x + group * own * g.tiling.plane() * pair.part.lanes, g.tiling,
                                     g.piece(0).step, pair.part, values + row * cols, !pair.first, begin,
                                     std::min(4 * last, filters));
            i = group * fours + last;
          }
        }
      });
    });
    const Matrix<T> to{product.mutable_data_ptr<T>(), cols, 1};
    at::parallel_for(0, g.rows, grain(cols), [&](int64_t b, int64_t e) {
      copy_out<A, T>(values + b * cols, cols, {to.at(b, 0), cols, 1}, e - b, cols);
    });
  });
  return product;
}

Tensor masked_conv2d_weight(const Tensor& grad, const Tensor& x, at::TensorList streams, at::TensorList,
                            at::IntArrayRef geometry, at::IntArrayRef, at::IntArrayRef numbers,
                            const Tensor& words, at::IntArrayRef weight_shape) {
  const Geometry g(geometry);
  check_weight_gradient(grad, x, g);
  Tensor product = at::empty(weight_shape, x.options());
  if (x.size(0) == 0) return product.zero_();
  const double limit = is_batch_innermost(x) ? kDenseInnermost : kDenseElse;
  if (dense_pays(product, streams[1].numel(), x, g.height * g.width, limit))
    return masked_weight(conv2d_weight(grad, x, geometry, weight_shape, numbers), words);
  product.zero_();
  const Geometry::Positions p = g.piece(0);
  const Stream stream = piece_stream(streams, 0, g.rows, product.numel() / g.rows, p.block);
  const Tiling out = output_tiling(g);
  dispatch(x.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    A* const values = scratch<A, kValues>(kept_entries(stream));
    for_each_pairs<T>(grad, x, g, out, [&](const std::vector<TilePair<A>>& pairs, int64_t work) {
      over_rows(stream, work, [&](int64_t b, int64_t e) {
        for (const TilePair<A>& pair : pairs)
          convolve_weight<A>(stream, pair.grad, out, pair.x, g.tiling, p.step, pair.part, values, !pair.first,
                             b, e);
      });
    });
    Stream places = stream;
    places.column = streams[1].const_data_ptr<int32_t>();
    over_rows(stream, 1, [&](int64_t b, int64_t e) {
      scatter_values<T>(places, values, {product.mutable_data_ptr<T>(), 0, 1}, b, e);
    });
  });
  return product;
}

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) {
  m.impl("conv2d_entries", conv2d_entries);
  m.impl("masked_conv2d", masked_conv2d);
  m.impl("masked_conv2d_input", masked_conv2d_input);
  m.impl("masked_conv2d_weight", masked_conv2d_weight);
  m.impl("conv2d_weight", conv2d_weight);
}

}  // namespace blokern

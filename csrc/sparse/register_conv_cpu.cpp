// Convolutions with a masked weight on CPU tensors: tiles, threads. Arithmetic: conv_cpu.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <span>

#include "sparse/conv.h"
#include "sparse/conv_entries.h"
#include "sparse/conv_planes.h"
#include "sparse/register_conv_plan.h"
#include "sparse/torch_cpu.h"

namespace blokern {
namespace {

using namespace conv_ops;

constexpr int64_t kPackedBytes = 16 << 20;

// A layout in which the rows of a plane follow one another, and samples or pixels are innermost.
Tensor tileable(const Tensor& x) {
  const bool flat = x.size(2) == 1 || x.stride(2) == x.size(3) * x.stride(3);
  return flat && (is_batch_innermost(x) || x.stride(3) == 1) ? x : x.contiguous();
}

template <class T>
Images<const T> images(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(3), x.size(2), x.size(3)};
}

Stream with_columns(Stream stream, const Tensor& column) {
  stream.column = column.const_data_ptr<int32_t>();
  return stream;
}

// Values in the stream's order; `source` is the entries' places in the weight.
template <class T>
void gather(const Stream& stream, const Tensor& source, const Tensor& weight, Accum<T>* values) {
  const Stream places = with_columns(stream, source);
  over_rows(stream, 1, [&](int64_t b, int64_t e) {
    gather_values<T>(places, {weight.const_data_ptr<T>(), 0, 1}, values, b, e);
  });
}

// The i-th piece's stream, its entries' places in a weight of that many elements, and in a tile that is
// walked from `positions` on.
Stream piece_stream(at::TensorList streams, size_t i, const Geometry& g, int64_t weight, const Walk& walk) {
  const Tensor &source = streams[3 * i + 1], &offset = streams[3 * i + 2];
  const Stream stream = stream_of(streams[3 * i], offset, g.rows, weight / g.rows, g.piece(i).block);
  TORCH_CHECK_TYPE(source.scalar_type() == at::kInt, "source must be int32, got ", source.scalar_type());
  TORCH_CHECK_VALUE(source.numel() == offset.numel() && source.is_contiguous(),
                    "a stream must have a place in the weight for each of its ", offset.numel(),
                    " entries, got ", source.numel());
  const int64_t pixels = g.tiling.channels * g.tiling.plane() - walk.last(g.tiling);
  over_rows(stream, 1, [&](int64_t b, int64_t e) {
    check_places(stream, pixels, "offsets", b, e);
    check_places(with_columns(stream, source), weight, "places in the weight", b, e);
  });
  return stream;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_entries(const Tensor& words, at::IntArrayRef weight, int64_t groups,
                                                  at::IntArrayRef place, int64_t plane, int64_t block,
                                                  bool transposed) {
  TORCH_CHECK_VALUE(weight.size() == 3 && groups > 0 && weight[0] % groups == 0 && block > 0 &&
                        static_cast<int64_t>(place.size()) == weight[2],
                    "weight must be [rows, own, taps] with a place for each tap, got ", weight, " and ",
                    place);
  check_range(weight, 0, "weight");
  check_range(place, -1, "place");
  check_range({plane, block, groups}, 0, "plane, block and groups");
  const MaskWords mask = words_of(words, weight[0], checked_product({weight[1], weight[2]}, "weight"));
  checked_product({mask.rows, mask.cols}, "weight");
  checked_product({std::max(weight[0], groups * weight[1]), plane}, "the tile");
  for (const int64_t pixel : place)
    TORCH_CHECK_VALUE(pixel < plane, "place must be below plane, ", plane, ", got ", pixel);
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

// ---- 1 × 1 convolutions: a product with every pixel, so that pixels lie in the lanes, in whatever layout,
// and no plane is padded or transposed. A tile is a run of pixels, kConvLanes of them to a position.

struct PixelRun {
  int64_t image, first;  // its pixel
  int64_t positions, count;
  bool across;  // positions are the same pixels of one image after the other, else the next of one image
};

// Each image's pixels as far as they fill runs, or, of few images, lanes; then the rest, across images. All
// pixels of samples-innermost tensors are one image.
template <class A>
std::vector<PixelRun> pixel_runs(const Tensor& x, bool samples_innermost) {
  constexpr int64_t lanes = kConvLanes<A>, run = kRunPositions * lanes;
  const int64_t images = samples_innermost ? 1 : x.size(0),
                pixels = x.size(2) * x.size(3) * (x.size(0) / images);
  const int64_t step = images < kRunPositions ? lanes : run, whole = pixels / step * step;
  std::vector<PixelRun> runs;
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t first = 0; first < whole; first += run)
      runs.push_back({image, first, std::min(kRunPositions, (whole - first) / lanes), lanes, false});
  }
  for (int64_t first = whole; first < pixels; first += lanes) {
    for (int64_t image = 0; image < images; image += kRunPositions)
      runs.push_back(
          {image, first, std::min(kRunPositions, images - image), std::min(lanes, pixels - first), true});
  }
  return runs;
}

template <class T>
Images<const T> pixels(const Tensor& x, const PixelRun& run) {
  const int64_t first = run.image * x.stride(0) + run.first;
  const int64_t next = run.across ? x.stride(0) : kConvLanes<Accum<T>>;
  return {x.const_data_ptr<T>() + first, 1, x.stride(1), next, 1, run.positions};
}

template <class T>
void correlate_pixels(const Tensor& x, const Tiling& tiling, const Piece<T>& piece, const T* bias,
                      const Tensor& y) {
  const std::vector<PixelRun> runs = pixel_runs<Accum<T>>(x, is_batch_innermost(x));
  const int64_t work = (piece.stream.rows + kept_entries(piece.stream)) * kRunPositions * kConvLanes<float>;
  at::parallel_for(0, runs.size(), grain(work), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const Images<const T> from = pixels<T>(x, runs[i]), to = pixels<T>(y, runs[i]);
      Piece<T> of_run = piece;
      of_run.width = of_run.row = runs[i].positions;
      convolve<T>(from, tiling, {&of_run, 1}, bias,
                  {const_cast<T*>(to.data), to.sample, to.channel, to.pixel, to.height, to.width},
                  runs[i].count, 0, 1);
    }
  });
}

// ---- Few samples

bool is_planar(const Tensor& x, const Geometry& g) {
  return x.size(0) <= kPlanesSamples && !is_batch_innermost(x) && g.pieces() == 1 && g.tiling.row_step == 1 &&
         g.piece(0).step == 1;
}

template <class T>
void correlate_planes(const Tensor& x, const Tiling& tiling, const Piece<T>& piece, const T* bias,
                      const Tensor& y) {
  const Images<const T> from = images<T>(x);
  const int64_t rows = piece.stream.rows, tiles = (piece.height + tiling.height - 1) / tiling.height;
  const int64_t planes = x.size(0) * tiles;
  // Where tiles are fewer than threads, they share a tile's output channels.
  const int64_t shares =
      std::clamp<int64_t>(2 * at::get_num_threads() / planes, 1, std::max<int64_t>(1, rows / 8));
  const int64_t work = (rows + kept_entries(piece.stream)) * tiling.height * piece.width / shares;
  at::parallel_for(0, planes * shares, grain(work), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t image = i / shares / tiles, h = i / shares % tiles * tiling.height, share = i % shares;
      convolve_planes<T>(
          {from.data + image * from.sample, 0, from.channel, 1, from.height, from.width}, tiling, piece, bias,
          {y.mutable_data_ptr<T>() + image * y.stride(0), 0, y.stride(1), 1, piece.height, piece.width}, h,
          rows * share / shares, rows * (share + 1) / shares);
    }
  });
}

// streams: start, source and offset of each piece.
Tensor correlate(const Tensor& images_in, const Tensor& weight, const OptionalTensor& bias,
                 at::TensorList streams, const Geometry& g, bool pointwise) {
  const Tensor x = tileable(images_in);
  const int64_t samples = x.size(0);
  Tensor y = is_batch_innermost(x)
                 ? at::empty({g.rows, g.height, g.width, samples}, x.options()).permute({3, 0, 1, 2})
                 : at::empty({samples, g.rows, g.height, g.width}, x.options());
  if (y.numel() == 0) return y;
  if (weight.numel() == 0) return fill_with_bias(y, bias);
  const Tensor dense = weight.contiguous(), offsets = bias.has_value() ? bias->contiguous() : Tensor();
  dispatch(x.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    std::vector<Piece<T>> pieces;
    int64_t entries = 0;
    for (size_t i = 0; i < g.pieces(); ++i) entries += streams[3 * i + 1].numel();
    A* values = scratch<A, kValues>(entries);
    for (size_t i = 0; i < g.pieces(); ++i) {
      const Geometry::Positions p = g.piece(i);
      const Stream stream = piece_stream(streams, i, g, weight.numel(), {p.height, p.width, p.step});
      gather<T>(stream, streams[3 * i + 1], dense, values);
      pieces.push_back({stream, values, p.height, p.width, p.step, p.origin_h * g.width + p.origin_w,
                        p.stride_h * g.width, p.stride_w});
      values += kept_entries(stream);
    }
    const T* const offset = offsets.defined() ? offsets.const_data_ptr<T>() : nullptr;
    if (pointwise) return correlate_pixels<T>(x, g.tiling, pieces[0], offset, y);
    if (is_planar(x, g)) return correlate_planes<T>(x, g.tiling, pieces[0], offset, y);
    const Images<T> out{y.mutable_data_ptr<T>(), y.stride(0), y.stride(1), y.stride(3), g.height, g.width};
    const int64_t tiles = count_tiles<A>(g.tiling, pieces[0].height, samples);
    const int64_t work = (g.rows + entries) * g.height * g.width * samples / tiles;
    at::parallel_for(0, tiles, grain(work), [&](int64_t b, int64_t e) {
      convolve<T>(images<T>(x), g.tiling, pieces, offset, out, samples, b, e);
    });
  });
  return y;
}

// Whether it is a product with every pixel; checks that all the plan says fits the images that are walked.
bool checked_pointwise(const Geometry& g, at::IntArrayRef weight, at::IntArrayRef numbers, const Tensor& x) {
  check_numbers(weight, numbers);
  const bool pointwise = is_pointwise(weight, numbers);
  pointwise ? g.check_runs(x.size(2), x.size(3)) : g.check_pieces();
  return pointwise;
}

bool checked_pointwise(const Geometry& g, at::TensorList streams, at::IntArrayRef weight,
                       at::IntArrayRef numbers, const Tensor& x) {
  TORCH_CHECK_VALUE(streams.size() == 3 * g.pieces(), "a plan of ", g.pieces(), " pieces must have ",
                    3 * g.pieces(), " tensors for its streams, got ", streams.size());
  return checked_pointwise(g, weight, numbers, x);
}

enum class Product { kOutput, kByInput, kByWeight };

// Whether the dense product is faster, by the densities from which it is; measured at layers of ResNet-18 and
// -50. Torch copies samples-innermost tensors first: of those, the dense product is faster only where the batch
// has fewer samples than our kernel has lanes.
bool dense_pays(Product product, const Tensor& weight, int64_t kept, const Tensor& x,
                at::IntArrayRef numbers) {
  const int64_t samples = x.size(0), positions = x.size(2) * x.size(3);
  const bool pointwise = is_pointwise(weight.sizes(), numbers), strided = numbers[0] * numbers[1] > 1;
  const bool planar = samples <= kPlanesSamples && !strided && product != Product::kByWeight;
  double limit = planar ? 0.35 : pointwise ? 0.2 : strided && product == Product::kByInput ? 0.1 : 0.3;
  if (is_batch_innermost(x)) limit = 1.0;
  if (!pointwise && (!planar || is_batch_innermost(x))) {
    const int64_t lanes = samples > kNarrowLanes<float> ? kConvLanes<float> : kNarrowLanes<float>;
    limit *= static_cast<double>(samples) / static_cast<double>((samples + lanes - 1) / lanes * lanes);
  }
  return may_be_dense(weight, positions * samples) &&
         static_cast<double>(kept) > limit * static_cast<double>(weight.numel());
}

Tensor masked_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     at::TensorList streams, at::TensorList streams_t, at::IntArrayRef geometry,
                     at::IntArrayRef, at::IntArrayRef numbers, const Tensor& words, bool /*dense_grad*/) {
  const Geometry g(geometry);
  check_convolution(x, weight, bias, g);
  check_plan(x, streams, streams_t, words);
  const bool pointwise = checked_pointwise(g, streams, weight.sizes(), numbers, x);
  if (dense_pays(Product::kOutput, weight, streams[1].numel(), x, numbers)) {
    const std::array<int64_t, 4> out{x.size(0), g.rows, g.height, g.width};
    return laid_out(DenseConv(numbers).forward(x, out, masked_weight(weight, words), bias), x);
  }
  return correlate(x, weight, bias, streams, g, pointwise);
}

Tensor masked_conv2d_input(const Tensor& grad, const Tensor& weight, at::TensorList streams,
                           at::TensorList streams_t, at::IntArrayRef, at::IntArrayRef geometry,
                           at::IntArrayRef numbers, const Tensor& words, bool /*dense_grad*/) {
  const Geometry g(geometry);
  check_images(grad, "grad", g.channels);
  check_weight(weight, grad);
  check_plan(grad, streams, streams_t, words);
  const bool pointwise = checked_pointwise(g, streams_t, weight.sizes(), numbers, grad);
  int64_t kept = 0;
  for (size_t i = 0; i < g.pieces(); ++i) kept += streams_t[3 * i + 1].numel();
  if (dense_pays(Product::kByInput, weight, kept, grad, numbers)) {
    const std::array<int64_t, 4> size{grad.size(0), g.rows, g.height, g.width};
    return laid_out(DenseConv(numbers).by_input(grad, size, masked_weight(weight, words)), grad);
  }
  return correlate(grad, weight, {}, streams_t, g, pointwise);
}

// A tile of the output's gradient and that of the input: what they are packed from, and where.
template <class T>
struct TilePair {
  Images<const T> grad_images, x_images;
  Part part;
  bool first;  // of the batch
  Accum<T>*grad, *x;
};

template <class T>
std::vector<TilePair<T>> tile_pairs(const Tensor& grad, const Tensor& x, const Geometry& g, bool pointwise) {
  using A = Accum<T>;
  std::vector<TilePair<T>> pairs;
  const auto add = [&](const Images<const T>& of_grad, const Images<const T>& of_x, const Part& part) {
    pairs.push_back({of_grad, of_x, part, pairs.empty(), nullptr, nullptr});
  };
  if (pointwise) {
    for (const PixelRun& run : pixel_runs<A>(x, is_batch_innermost(x) && is_batch_innermost(grad)))
      add(pixels<T>(grad, run), pixels<T>(x, run), part_of<A>(g.tiling, 1, run.count, 0));
  } else {
    const int64_t samples = x.size(0);
    for (int64_t tile = 0; tile < count_tiles<A>(g.tiling, g.height, samples); ++tile)
      add(images<T>(grad), images<T>(x), part_of<A>(g.tiling, g.height, samples, tile));
  }
  return pairs;
}

// body(pairs, positions and samples they have) for as many tiles at a time as the last-level cache holds:
// threads share the packing, then the rows.
template <class T, class Body>
void for_each_pairs(const Tensor& grad, const Tensor& x, const Geometry& g, const Tiling& out, bool pointwise,
                    Body&& body) {
  using A = Accum<T>;
  Tensor inputs = tileable(x), grads = tileable(grad);
  if (pointwise && is_batch_innermost(inputs) != is_batch_innermost(grads)) {  // runs of pixels in one order
    inputs = inputs.contiguous();
    grads = grads.contiguous();
  }
  std::vector<TilePair<T>> pairs = tile_pairs<T>(grads, inputs, g, pointwise);
  const int64_t tiles = pairs.size(), channels = g.rows + g.tiling.channels;
  const int64_t out_size = out.channels * out.plane() * kConvLanes<A>;
  const int64_t size = out_size + g.tiling.channels * g.tiling.plane() * kConvLanes<A>;
  const int64_t group = std::clamp<int64_t>(kPackedBytes / (size * sizeof(A)), 1, tiles);
  A* const packed = scratch<A, kFactor>(group * size);
  for (int64_t i = 0; i < tiles; ++i) {
    pairs[i].grad = packed + i % group * size;
    pairs[i].x = pairs[i].grad + out_size;
  }
  for (int64_t first = 0; first < tiles; first += group) {
    const std::span<const TilePair<T>> some(pairs.data() + first, std::min(group, tiles - first));
    at::parallel_for(0, some.size() * channels, grain(size / channels), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const TilePair<T>& pair = some[i / channels];
        const int64_t channel = i % channels, c = channel - g.rows;
        if (c < 0)
          pack_tile<T>(pair.grad_images, out, pair.part, pair.grad, channel, channel + 1);
        else
          pack_tile<T>(pair.x_images, g.tiling, pair.part, pair.x, c, c + 1);
      }
    });
    body(some, x.size(0) * g.height * g.width * static_cast<int64_t>(some.size()) / tiles);
  }
}

void check_weight_shape(at::IntArrayRef weight, at::IntArrayRef numbers, const Geometry& g, bool pointwise) {
  check_range(weight, 0, "weight_shape");
  const at::IntArrayRef dilation = DenseConv(numbers).dilation;
  const int64_t groups = numbers[6];
  const int64_t reach = (weight[2] - 1) * dilation[0] * g.tiling.width + (weight[3] - 1) * dilation[1];
  TORCH_CHECK_VALUE(weight[0] == g.rows && g.rows % groups == 0 && weight[1] * groups == g.channels &&
                        reach + g.walk(pointwise).last(g.tiling) < g.tiling.plane(),
                    "weight_shape ", weight, " is not that of the plan");
}

// The tiling of the output's gradient.
Tiling output_tiling(const Geometry& g, bool pointwise) {
  return {g.rows, 0, 0, g.tiling.height, pointwise ? kRunPositions : g.width, g.tiling.height, 1};
}

Tensor conv2d_weight(const Tensor& grad, const Tensor& x, at::IntArrayRef geometry,
                     at::IntArrayRef weight_shape, at::IntArrayRef numbers) {
  const Geometry g(geometry);
  check_weight_gradient(grad, x, g);
  const bool pointwise = checked_pointwise(g, weight_shape, numbers, x);
  check_weight_shape(weight_shape, numbers, g, pointwise);
  Tensor product = at::empty(weight_shape, x.options());
  if (x.size(0) == 0 || product.numel() == 0) return product.zero_();
  // Torch would copy samples-innermost factors first.
  if (!is_batch_innermost(x)) return DenseConv(numbers).by_weight(grad, x, weight_shape);
  const at::IntArrayRef dilation = DenseConv(numbers).dilation;
  const int64_t own = weight_shape[1], cols = product.numel() / weight_shape[0];
  const int64_t groups = g.tiling.channels / own, filters = g.rows / groups;
  std::vector<int32_t> offset;
  for (int64_t c = 0; c < own; ++c) {
    for (int64_t h = 0; h < weight_shape[2]; ++h) {
      for (int64_t w = 0; w < weight_shape[3]; ++w)
        offset.push_back(c * g.tiling.plane() + h * dilation[0] * g.tiling.width + w * dilation[1]);
    }
  }
  const Tiling out = output_tiling(g, pointwise);
  dispatch(x.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    A* const values = scratch<A, kValues>(product.numel());
    for_each_pairs<T>(grad, x, g, out, pointwise, [&](std::span<const TilePair<T>> pairs, int64_t work) {
      // Rows are shared out in fours, as the kernel takes them.
      at::parallel_for(0, groups * ((filters + 3) / 4), grain(4 * cols * work), [&](int64_t b, int64_t e) {
        const int64_t fours = (filters + 3) / 4;
        for (const TilePair<T>& pair : pairs) {
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
    T* const to = product.mutable_data_ptr<T>();
    at::parallel_for(0, g.rows, grain(cols), [&](int64_t b, int64_t e) {
      store_values<T>(values + b * cols, to + b * cols, (e - b) * cols);
    });
  });
  return product;
}

Tensor masked_conv2d_weight(const Tensor& grad, const Tensor& x, at::TensorList streams,
                            at::TensorList streams_t, at::IntArrayRef geometry, at::IntArrayRef,
                            at::IntArrayRef numbers, const Tensor& words, at::IntArrayRef weight_shape) {
  const Geometry g(geometry);
  check_weight_gradient(grad, x, g);
  check_plan(x, streams, streams_t, words);
  const bool pointwise = checked_pointwise(g, streams, weight_shape, numbers, x);
  check_weight_shape(weight_shape, numbers, g, pointwise);
  Tensor product = at::empty(weight_shape, x.options());
  if (x.size(0) == 0 || product.numel() == 0) return product.zero_();
  if (dense_pays(Product::kByWeight, product, streams[1].numel(), x, numbers))
    return masked_weight(conv2d_weight(grad, x, geometry, weight_shape, numbers), words);
  product.zero_();
  const Geometry::Positions p = g.piece(0);
  const Stream stream = piece_stream(streams, 0, g, product.numel(), g.walk(pointwise));
  const Tiling out = output_tiling(g, pointwise);
  dispatch(x.scalar_type(), [&]<class T>() {
    using A = Accum<T>;
    A* const values = scratch<A, kValues>(kept_entries(stream));
    for_each_pairs<T>(grad, x, g, out, pointwise, [&](std::span<const TilePair<T>> pairs, int64_t work) {
      over_rows(stream, work, [&](int64_t b, int64_t e) {
        for (const TilePair<T>& pair : pairs)
          convolve_weight<A>(stream, pair.grad, out, pair.x, g.tiling, p.step, pair.part, values, !pair.first,
                             b, e);
      });
    });
    const Stream places = with_columns(stream, streams[1]);
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

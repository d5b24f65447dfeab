#include "sparse/conv.h"

#include <algorithm>

#include "sparse/walk_cpu.h"
#include "support/scratch.h"

namespace blokern {
namespace {

// Output positions a walk takes at a time: eight vectors of sums hide a multiply-add's latency.
template <int kVectors>
constexpr int kPositions = std::max(1, 8 / kVectors);

// A strip of output positions and of output channels whose sums, with a block of the tile and the stream,
// stay in the second-level cache.
constexpr int64_t kStrip = 16, kStripRows = 128;
// Output positions whose products a derivative by the weight adds up in registers: more, and four rows of
// them leave the first-level cache; fewer, and adding up the lanes at their end takes a quarter of the time.
constexpr int64_t kWeightStrip = 32;

// body<kVectors>() for a part's lanes.
template <class A, class Body>
void with_vectors(const Part& part, Body&& body) {
  if (part.lanes == kConvLanes<A>)
    body.template operator()<kConvLanes<A> / Vector<A>::size>();
  else
    body.template operator()<kNarrowLanes<A> / Vector<A>::size>();
}

// Pixels of a part whose lanes are all in use, samples innermost on both sides; `from_pixel`
// and `to_pixel` apart.
template <class A, int kVectors, bool kPastCache = false, class From, class To>
BLOKERN_INLINE void copy_pixels(const From* from, int64_t from_pixel, To* to, int64_t to_pixel,
                                int64_t pixels) {
  constexpr int n = Vector<A>::size;
  for (int64_t i = 0; i < pixels; ++i, from += from_pixel, to += to_pixel) {
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kPastCache && std::is_same_v<To, A>)
        stream_vector(to + v * n, load_vector(from + v * n));
      else
        store_vector(to + v * n, load_vector(from + v * n));
    }
  }
}

// sums [rows][row's stride `strip`][lanes] ← output positions [w, w_end) of one row, from `origin` on.
template <class T, int kVectors>
void convolve_row(const Piece<T>& piece, const Accum<T>* origin, const T* bias, int64_t w, int64_t w_end,
                  Accum<T>* sums, int64_t strip, int64_t begin, int64_t end) {
  using A = Accum<T>;
  constexpr int64_t lanes = kVectors * Vector<A>::size;
  constexpr int count = kPositions<kVectors>;
  const int64_t step = piece.step * lanes, first = w;
  const auto at = [&]<int kCount>(int64_t position) {
    multiply<A, T, kVectors, kCount>(piece.stream, piece.values, origin + position * step, step, bias,
                                     sums + (position - first) * lanes, strip * lanes, begin, end);
  };
  if (w_end - w < count) {
    for (; w < w_end; ++w) at.template operator()<1>(w);
  } else {
    for (; w + count <= w_end; w += count) at.template operator()<count>(w);
    if (w < w_end) at.template operator()<count>(w_end - count);  // some of them a second time
  }
}

template <class T, int kVectors>
void convolve_part(const Piece<T>& piece, const Tiling& tiling, const Part& part, const Accum<T>* tile,
                   const T* bias, const Images<T>& y, bool past_cache, Accum<T>* sums) {
  using A = Accum<T>;
  constexpr int64_t lanes = kVectors * Vector<A>::size;
  const int64_t h_end = std::min(part.h + part.height, piece.height), width = std::min(piece.width, kStrip);
  const int64_t height = kStrip / width;  // output rows a strip
  for (int64_t r = 0; r < piece.stream.rows; r += kStripRows) {
    const int64_t r_end = std::min(r + kStripRows, piece.stream.rows);
    for (int64_t h = part.h; h < h_end; h += height) {
      const int64_t rows = std::min(height, h_end - h);
      for (int64_t w = 0; w < piece.width; w += width) {
        const int64_t w_end = std::min(w + width, piece.width), strip = rows * (w_end - w);
        for (int64_t i = 0; i < rows; ++i)
          convolve_row<T, kVectors>(piece, tile + (h + i - part.h) * tiling.row_step * tiling.width * lanes,
                                    bias, w, w_end, sums + i * (w_end - w) * lanes, strip, r, r_end);
        const bool flat = piece.row == (w_end - w) * piece.column;
        for (int64_t k = r; k < r_end; ++k) {
          const A* from = sums + (k - r) * strip * lanes;
          for (int64_t i = 0; i < rows; i += flat ? rows : 1) {
            const int64_t count = flat ? strip : w_end - w,
                          pixel = piece.first + (h + i) * piece.row + w * piece.column;
            const Matrix<T> to{y.data + part.first * y.sample + k * y.channel + pixel * y.pixel,
                               piece.column * y.pixel, y.sample};
            if (to.col_stride != 1 || part.count != lanes)
              copy_out<A, T>(from, lanes, to, count, part.count);
            else if (past_cache)
              copy_pixels<A, kVectors, true>(from, lanes, to.data, to.row_stride, count);
            else
              copy_pixels<A, kVectors>(from, lanes, to.data, to.row_stride, count);
            from += count * lanes;
          }
        }
      }
    }
  }
}

// body<kVectors>(factor, its rows' distance, tile, places, whether it is not the first) for strips of a
// part's output rows: a block of the tile then stays in the second-level cache while all rows pass over it.
template <class A, class Body>
void for_each_strip(const A* grad, const Tiling& grad_tiling, const A* tile, const Tiling& tiling,
                    int64_t step, const Part& part, Body&& body) {
  const int64_t line = tiling.row_step * tiling.width * part.lanes, width = grad_tiling.width,
                rows = std::max<int64_t>(1, kWeightStrip / width);
  for (int64_t h = 0; h < part.height; h += rows) {
    const Places places{std::min(rows, part.height - h), width, line, step * part.lanes};
    with_vectors<A>(part, [&]<int kVectors>() {
      body.template operator()<kVectors>(grad + h * width * part.lanes, grad_tiling.plane() * part.lanes,
                                         tile + h * line, places, h > 0);
    });
  }
}

}  // namespace

template <class A>
int64_t count_tiles(const Tiling& tiling, int64_t height, int64_t samples) {
  const int64_t panels = (samples + kConvLanes<A> - 1) / kConvLanes<A>;
  return panels * ((height + tiling.height - 1) / tiling.height);
}

template <class A>
Part part_of(const Tiling& tiling, int64_t height, int64_t samples, int64_t tile) {
  const int64_t tiles = (height + tiling.height - 1) / tiling.height;
  const int64_t first = tile / tiles * kConvLanes<A>, h = tile % tiles * tiling.height;
  const int64_t left = samples - first;
  const int64_t lanes = left > kNarrowLanes<A> ? kConvLanes<A> : kNarrowLanes<A>;
  return {first, std::min(lanes, left), lanes, h, std::min(tiling.height, height - h)};
}

template <class T>
void pack_tile(const Images<const T>& x, const Tiling& tiling, const Part& part, Accum<T>* tile,
               int64_t begin, int64_t end) {
  using A = Accum<T>;
  // The tile's rows lie `above` rows below the image's first; those from `from` to `to` are the image's.
  const int64_t above = part.h * tiling.row_step - tiling.top;
  const int64_t from = std::clamp<int64_t>(-above, 0, tiling.rows);
  const int64_t to = std::clamp<int64_t>(x.height - above, from, tiling.rows);
  const int64_t lanes = part.lanes, left = tiling.left * lanes, line = tiling.width * lanes;
  const int64_t width = std::min(x.width, tiling.width - tiling.left);
  // Transposes want pixels in long rows: all at once, then into place.
  const bool in_place = x.sample == 1;
  A* const pixels = in_place ? nullptr : scratch<A>((to - from) * x.width * lanes);
  for (int64_t c = begin; c < end; ++c) {
    A* const plane = tile + c * tiling.plane() * lanes;
    const T* const image =
        x.data + part.first * x.sample + c * x.channel + (above + from) * x.width * x.pixel;
    if (!in_place)
      copy_in<A, T>({image, x.pixel, x.sample}, pixels, lanes, (to - from) * x.width, part.count);
    std::fill(plane, plane + from * line, A(0));
    for (int64_t h = from; h < to; ++h) {
      A* const row = plane + h * line;
      std::fill(row, row + left, A(0));
      const T* const line_in = image + (h - from) * x.width * x.pixel;
      if (in_place && part.count == lanes)
        with_vectors<A>(part, [&]<int kVectors>() {
          copy_pixels<A, kVectors>(line_in, x.pixel, row + left, lanes, width);
        });
      else if (in_place)
        copy_in<A, T>({line_in, x.pixel, 1}, row + left, lanes, width, part.count);
      else
        std::copy_n(pixels + (h - from) * x.width * lanes, width * lanes, row + left);
      std::fill(row + left + width * lanes, row + line, A(0));
    }
    std::fill(plane + to * line, plane + tiling.rows * line, A(0));
    if (part.count == lanes) continue;
    for (int64_t i = 0; i < tiling.plane(); ++i)
      std::fill(plane + i * lanes + part.count, plane + (i + 1) * lanes, A(0));
  }
}

template <class T>
void convolve(const Images<const T>& x, const Tiling& tiling, std::span<const Piece<T>> pieces, const T* bias,
              const Images<T>& y, int64_t samples, int64_t begin, int64_t end) {
  using A = Accum<T>;
  A* const tile = scratch<A, kTile>(tiling.channels * tiling.plane() * kConvLanes<A>);
  A* const sums = scratch<A, kSums>(kStripRows * kStrip * kConvLanes<A>);
  const int64_t planes = pieces[0].stream.rows * y.height * y.width;
  const bool past_cache =
      goes_past_cache(y.data, planes * samples, y.pixel) && y.channel * sizeof(T) % kVectorBytes == 0;
  for (int64_t i = begin; i < end; ++i) {
    const Part part = part_of<A>(tiling, pieces[0].height, samples, i);
    pack_tile<T>(x, tiling, part, tile, 0, tiling.channels);
    for (const Piece<T>& piece : pieces) {
      with_vectors<A>(part, [&]<int kVectors>() {
        convolve_part<T, kVectors>(piece, tiling, part, tile, bias, y, past_cache, sums);
      });
    }
  }
  if (past_cache) streamed();
}

template <class A>
void convolve_weight(const Stream& stream, const A* grad, const Tiling& grad_tiling, const A* tile,
                     const Tiling& tiling, int64_t step, const Part& part, A* values, bool add, int64_t begin,
                     int64_t end) {
  for_each_strip<A>(
      grad, grad_tiling, tile, tiling, step, part,
      [&]<int kVectors>(const A* a, int64_t a_row, const A* b, const Places& places, bool more) {
        inner_products<A, kVectors>(stream, a, a_row, b, places, values, add || more, begin, end);
      });
}

template <class A>
void convolve_dense_weight(const int32_t* offset, int64_t cols, const A* grad, const Tiling& grad_tiling,
                           const A* tile, const Tiling& tiling, int64_t step, const Part& part, A* values,
                           bool add, int64_t begin, int64_t end) {
  for_each_strip<A>(
      grad, grad_tiling, tile, tiling, step, part,
      [&]<int kVectors>(const A* a, int64_t a_row, const A* b, const Places& places, bool more) {
        dense_inner_products<A, kVectors>(offset, cols, a, a_row, b, places, values, add || more, begin, end);
      });
}

template <class T>
void store_values(const Accum<T>* values, T* to, int64_t count) {
  copy_row<Accum<T>>(values, to, count);
}

#define INSTANTIATE(T)                                                                                  \
  template void pack_tile<T>(const Images<const T>&, const Tiling&, const Part&, Accum<T>*, int64_t,    \
                             int64_t);                                                                  \
  template void convolve<T>(const Images<const T>&, const Tiling&, std::span<const Piece<T>>, const T*, \
                            const Images<T>&, int64_t, int64_t, int64_t);                               \
  template void store_values<T>(const Accum<T>*, T*, int64_t);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)
#undef INSTANTIATE
#define INSTANTIATE(A)                                                                                       \
  template int64_t count_tiles<A>(const Tiling&, int64_t, int64_t);                                          \
  template Part part_of<A>(const Tiling&, int64_t, int64_t, int64_t);                                        \
  template void convolve_weight<A>(const Stream&, const A*, const Tiling&, const A*, const Tiling&, int64_t, \
                                   const Part&, A*, bool, int64_t, int64_t);                                 \
  template void convolve_dense_weight<A>(const int32_t*, int64_t, const A*, const Tiling&, const A*,         \
                                         const Tiling&, int64_t, const Part&, A*, bool, int64_t, int64_t);
INSTANTIATE(double)
INSTANTIATE(float)
#undef INSTANTIATE

}  // namespace blokern

#include "sparse/conv.h"

#include <algorithm>

#include "sparse/walk_cpu.h"
#include "support/scratch.h"

namespace blokern {
namespace {

// Output positions a walk takes at a time: with a wide panel's lanes, sums fill half of AVX-512's registers.
constexpr int kPositions = kVectorBytes == 64 ? 4 : 1;

// Output rows a tile holds: it, a block of the planes and the stream then share the second-level cache.
constexpr int64_t kTileRows = 128;

// Output positions w and on, kCount of them, of one panel.
template <class T, int kVectors, int kCount>
void convolve_at(const Stream& stream, const Accum<T>* values, const Accum<T>* origin, const T* bias,
                 const Placement<T>& place, T* out, int64_t count, Accum<T>* tile) {
  using A = Accum<T>;
  constexpr int64_t lanes = kVectors * Vector<A>::size;
  for (int64_t first = 0; first < stream.rows; first += kTileRows) {
    const int64_t last = std::min(first + kTileRows, stream.rows);
    multiply<A, T, kVectors, kCount>(stream, values, origin, place.step_w * lanes, bias, tile, first, last);
    for (int64_t r = first; r < last; ++r) {
      for (int p = 0; p < kCount; ++p) {
        const A* const sums = tile + ((r - first) * kCount + p) * lanes;
        T* const to = out + r * place.row + p * place.out_w;
        if (count == lanes) {
          for (int v = 0; v < kVectors; ++v)
            store_vector(to + v * Vector<A>::size, load_vector(sums + v * Vector<A>::size));
        } else {
          for (int64_t s = 0; s < count; ++s) to[s] = static_cast<T>(sums[s]);
        }
      }
    }
  }
}

template <class T, int kVectors>
void convolve_row(const Stream& stream, const Accum<T>* values, const Accum<T>* panel, const T* bias,
                  const Placement<T>& place, int64_t h, int64_t first, int64_t count, Accum<T>* tile) {
  constexpr int64_t lanes = kVectors * Vector<Accum<T>>::size;
  const Accum<T>* const origin = panel + h * place.step_h * lanes;
  T* const out = place.out + h * place.out_h + first;
  int64_t w = 0;
  for (; w + kPositions <= place.width; w += kPositions)
    convolve_at<T, kVectors, kPositions>(stream, values, origin + w * place.step_w * lanes, bias, place,
                                         out + w * place.out_w, count, tile);
  for (; w < place.width; ++w)
    convolve_at<T, kVectors, 1>(stream, values, origin + w * place.step_w * lanes, bias, place,
                                out + w * place.out_w, count, tile);
}

}  // namespace

template <class T>
void pack_planes(const Images<const T>& x, const Planes& planes, int64_t top, int64_t left, int64_t samples,
                 Accum<T>* panels, int64_t begin, int64_t end) {
  using A = Accum<T>;
  const int64_t pixels = x.height * x.width;
  for_each_panel<A>(samples, [&](int64_t first, int64_t lanes) {
    const int64_t count = std::min(lanes, samples - first);
    const bool padded = planes.height != x.height || planes.width != x.width;
    A* const unpadded = padded ? scratch<A>(pixels * lanes) : nullptr;
    for (int64_t c = begin; c < end; ++c) {
      A* const plane = panels + planes.size() * first + c * planes.height * planes.width * lanes;
      A* const to = padded ? unpadded : plane;
      copy_in<A, T>({x.data + first * x.sample + c * x.channel, x.pixel, x.sample}, to, lanes, pixels, count);
      for (int64_t i = 0; count < lanes && i < pixels; ++i)
        std::fill(to + i * lanes + count, to + (i + 1) * lanes, A(0));
      if (!padded) continue;
      for (int64_t h = 0; h < planes.height; ++h) {
        A* const row = plane + h * planes.width * lanes;
        A* const row_end = row + planes.width * lanes;
        if (h < top || h >= top + x.height) {
          std::fill(row, row_end, A(0));
          continue;
        }
        const A* const from = unpadded + (h - top) * x.width * lanes;
        std::fill(row, row + left * lanes, A(0));
        A* const after = std::copy(from, from + x.width * lanes, row + left * lanes);
        std::fill(after, row_end, A(0));
      }
    }
  });
}

template <class T>
void convolve(const Stream& stream, const Accum<T>* values, const Accum<T>* panels, int64_t planes_size,
              const T* bias, const Placement<T>& place, int64_t samples, int64_t begin, int64_t end) {
  using A = Accum<T>;
  A* const tile = scratch<A>(kTileRows * kPositions * kWideLanes<A>);
  int64_t row = 0;
  for_each_panel<A>(samples, [&](int64_t first, int64_t lanes) {
    const int64_t count = std::min(lanes, samples - first);
    for (int64_t h = 0; h < place.height; ++h, ++row) {
      if (row < begin || row >= end) continue;
      const A* const panel = panels + planes_size * first;
      if (lanes == kWideLanes<A>)
        convolve_row<T, kWideLanes<A> / Vector<A>::size>(stream, values, panel, bias, place, h, first, count,
                                                         tile);
      else
        convolve_row<T, kNarrowLanes<A> / Vector<A>::size>(stream, values, panel, bias, place, h, first,
                                                           count, tile);
    }
  });
}

template <class A>
void convolve_weight(const Stream& stream, const A* grad_panels, const A* panels, int64_t planes_size,
                     int64_t height, int64_t width, int64_t step_h, int64_t step_w, A* values,
                     int64_t samples, int64_t begin, int64_t end) {
  const int64_t grad_row = height * width;
  for_each_panel<A>(samples, [&](int64_t first, int64_t lanes) {
    for (int64_t h = 0; h < height; ++h) {
      const A* const grad = grad_panels + (stream.rows * grad_row * first) + h * width * lanes;
      const A* const x = panels + planes_size * first + h * step_h * lanes;
      const bool add = first > 0 || h > 0;
      if (lanes == kWideLanes<A>)
        inner_products<A, kWideLanes<A> / Vector<A>::size>(stream, grad, grad_row * lanes, lanes, x,
                                                           step_w * lanes, width, values, add, begin, end);
      else
        inner_products<A, kNarrowLanes<A> / Vector<A>::size>(stream, grad, grad_row * lanes, lanes, x,
                                                             step_w * lanes, width, values, add, begin, end);
    }
  });
}

template <class T>
void copy_matrix(const Matrix<const T>& from, const Matrix<T>& to, int64_t cols, int64_t begin, int64_t end) {
  // A transpose in blocks that stay in the first-level cache.
  constexpr int64_t kBlock = 64;
  for (int64_t r = begin; r < end; r += kBlock) {
    const int64_t rows = std::min(kBlock, end - r);
    for (int64_t c = 0; c < cols; c += kBlock) {
      const Matrix<T> part{to.at(r, c), to.row_stride, to.col_stride};
      const int64_t count = std::min(kBlock, cols - c);
      if (from.col_stride == 1 && to.row_stride == 1) {
        copy_transposed<T, T, Accum<T>>(from.at(r, c), from.row_stride, part.data, to.col_stride, count,
                                        rows);
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < count; ++j) *part.at(i, j) = *from.at(r + i, c + j);
        }
      }
    }
  }
}

#define INSTANTIATE(T)                                                                                      \
  template void pack_planes<T>(const Images<const T>&, const Planes&, int64_t, int64_t, int64_t, Accum<T>*, \
                               int64_t, int64_t);                                                           \
  template void convolve<T>(const Stream&, const Accum<T>*, const Accum<T>*, int64_t, const T*,             \
                            const Placement<T>&, int64_t, int64_t, int64_t);                                \
  template void copy_matrix<T>(const Matrix<const T>&, const Matrix<T>&, int64_t, int64_t, int64_t);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(c10::BFloat16)
#undef INSTANTIATE
template void convolve_weight<double>(const Stream&, const double*, const double*, int64_t, int64_t, int64_t,
                                      int64_t, int64_t, double*, int64_t, int64_t, int64_t);
template void convolve_weight<float>(const Stream&, const float*, const float*, int64_t, int64_t, int64_t,
                                     int64_t, int64_t, float*, int64_t, int64_t, int64_t);

}  // namespace blokern

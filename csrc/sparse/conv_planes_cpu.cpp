#include "sparse/conv_planes.h"

#include <algorithm>

#include "sparse/walk_cpu.h"
#include "support/scratch.h"

namespace blokern {
namespace {

// Vectors of positions that a walk takes at a time, and at the end of a tile.
constexpr int kManyPixels = 8, kFewPixels = 2;

template <class T>
void pack_planes(const Images<const T>& image, const Tiling& tiling, int64_t h, Accum<T>* tile) {
  // As in pack_tile.
  const int64_t above = h * tiling.row_step - tiling.top;
  const int64_t from = std::clamp<int64_t>(-above, 0, tiling.rows);
  const int64_t to = std::clamp<int64_t>(image.height - above, from, tiling.rows);
  const int64_t width = std::min(image.width, tiling.width - tiling.left);
  for (int64_t c = 0; c < tiling.channels; ++c) {
    Accum<T>* const plane = tile + c * tiling.plane();
    std::fill_n(plane, tiling.plane(), Accum<T>(0));
    for (int64_t r = from; r < to; ++r)
      copy_row<Accum<T>>(image.data + c * image.channel + (above + r) * image.width,
                         plane + r * tiling.width + tiling.left, width);
  }
}

}  // namespace

template <class T>
void convolve_planes(const Images<const T>& image, const Tiling& tiling, const Piece<T>& piece, const T* bias,
                     const Images<T>& y, int64_t h, int64_t begin, int64_t end) {
  using A = Accum<T>;
  constexpr int n = Vector<A>::size;
  const int64_t height = std::min(tiling.height, piece.height - h);
  const int64_t positions = (height - 1) * tiling.width + piece.width, few = kFewPixels * n;
  const int64_t row = (positions + few - 1) / few * few;
  A* const tile = scratch<A, kTile>(tiling.channels * tiling.plane() + few);  // the last walk reads beyond
  A* const sums = scratch<A, kSums>((end - begin) * row);
  pack_planes<T>(image, tiling, h, tile);
  int64_t p = 0;
  for (; p + kManyPixels * n <= row; p += kManyPixels * n)
    multiply<A, T, kManyPixels, 1, 1>(piece.stream, piece.values, tile + p, 0, bias, sums + p, row, begin,
                                      end);
  for (; p < row; p += few)
    multiply<A, T, kFewPixels, 1, 1>(piece.stream, piece.values, tile + p, 0, bias, sums + p, row, begin,
                                     end);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t i = 0; i < height; ++i)
      copy_row<A>(sums + (r - begin) * row + i * tiling.width, y.data + r * y.channel + (h + i) * y.width,
                  piece.width);
  }
}

#define INSTANTIATE(T)                                                                               \
  template void convolve_planes<T>(const Images<const T>&, const Tiling&, const Piece<T>&, const T*, \
                                   const Images<T>&, int64_t, int64_t, int64_t);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)
#undef INSTANTIATE

}  // namespace blokern

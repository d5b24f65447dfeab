// Convolutions with a masked weight [rows, ...], a matrix whose kept entries each stand for one channel and
// tap.
//
// Samples lie in the vector lanes. Some output rows at a time, the input rows they need are packed as a tile,
// [channels][rows][width][lanes] with zeros around, in which an entry's input lies at one fixed offset from
// every output position: a convolution is then the walk of a linear layer, once for each position.
#pragma once

#include <cstdint>
#include <span>

#include "sparse/spmm.h"

namespace blokern {

// A batch [samples, channels, height, width]; elements of an image's plane are `pixel` apart.
template <class T>
struct Images {
  T* data;
  int64_t sample, channel, pixel;  // strides
  int64_t height, width;
};

// How an input is cut into tiles.
struct Tiling {
  int64_t channels;
  int64_t top, left;    // zeros before each plane
  int64_t rows, width;  // of a tile's planes
  int64_t height;       // output rows that a tile serves
  int64_t row_step;     // plane rows from one output row to the next

  int64_t plane() const { return rows * width; }
};

// The part of a batch that one tile serves: samples [first, first + count) in `lanes` lanes, output rows [h,
// h + height).
struct Part {
  int64_t first, count, lanes, h, height;
};

// How many tiles a batch has, panel after panel, and the part of one of them; for an output of `height` rows.
template <class A>
int64_t count_tiles(const Tiling& tiling, int64_t height, int64_t samples);
template <class A>
Part part_of(const Tiling& tiling, int64_t height, int64_t samples, int64_t tile);

// The most lanes a part has.
template <class A>
constexpr int64_t kConvLanes = 128 / sizeof(A);

// Channels [begin, end) of a part's input.
template <class T>
void pack_tile(const Images<const T>& x, const Tiling& tiling, const Part& part, Accum<T>* tile,
               int64_t begin, int64_t end);

// Output positions (h, w) that share a stream, whose columns are offsets in the tile.
template <class T>
struct Piece {
  Stream stream;
  const Accum<T>* values;
  int64_t height, width;
  int64_t step;                // tile pixels from one position to the next
  int64_t first, row, column;  // position (h, w) is pixel first + h · row + w · column of the output
};

// Tiles [begin, end) of the output y, whose first piece is the highest.
template <class T>
void convolve(const Images<const T>& x, const Tiling& tiling, std::span<const Piece<T>> pieces, const T* bias,
              const Images<T>& y, int64_t samples, int64_t begin, int64_t end);

// The derivative by the weight in one part, for rows [begin, end): values[i] ← or, with `add`, + the
// inner product of the output's gradient, packed as grad [rows][grad_tiling's plane][lanes], with the
// i-th entry's input.
template <class A>
void convolve_weight(const Stream& stream, const A* grad, const Tiling& grad_tiling, const A* tile,
                     const Tiling& tiling, int64_t step, const Part& part, A* values, bool add, int64_t begin,
                     int64_t end);

// The same where every entry is kept: offset [cols] is where each column's input lies, and values
// [rows][cols].
template <class A>
void convolve_dense_weight(const int32_t* offset, int64_t cols, const A* grad, const Tiling& grad_tiling,
                           const A* tile, const Tiling& tiling, int64_t step, const Part& part, A* values,
                           bool add, int64_t begin, int64_t end);

// values [count] in the weight's own type.
template <class T>
void store_values(const Accum<T>* values, T* to, int64_t count);

}  // namespace blokern

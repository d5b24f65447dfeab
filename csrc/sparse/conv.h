// Convolutions with a masked weight, without im2col. At one output position, the input that an entry of the
// weight multiplies lies at a fixed offset from that position's origin in zero-padded planes: a convolution
// is a sparse product whose stream holds such offsets for columns. Its gradients are products of the same
// kind.
#pragma once

#include <cstdint>

#include "sparse/spmm.h"

namespace blokern {

// The input of a batch's panel: [channels][height][width][lanes], zero-padded.
struct Planes {
  int64_t channels, height, width;
  int64_t size() const { return channels * height * width; }
};

// A batch of images [samples, channels, height, width]; elements of an image's plane are `pixel` apart.
template <class T>
struct Images {
  T* data;
  int64_t sample, channel, pixel;  // strides
  int64_t height, width;
};

// Where outputs come from and go to: output position (h, w) starts at h · step_h + w · step_w in a plane, and
// is stored in row r at r · row + h · out_h + w · out_w, samples innermost.
template <class T>
struct Placement {
  int64_t height, width;
  int64_t step_h, step_w;
  T* out;
  int64_t row, out_h, out_w;
};

// Channels [begin, end) of x into the panels of a batch, panel after panel, `top` and `left` zeros before
// each plane.
template <class T>
void pack_planes(const Images<const T>& x, const Planes& planes, int64_t top, int64_t left, int64_t samples,
                 Accum<T>* panels, int64_t begin, int64_t end);

// Output rows h [begin, end) of the batch's panels, counted panel after panel. stream.column: offsets in the
// planes.
template <class T>
void convolve(const Stream& stream, const Accum<T>* values, const Accum<T>* panels, int64_t planes_size,
              const T* bias, const Placement<T>& place, int64_t samples, int64_t begin, int64_t end);

// values[i] ← the derivative by the i-th entry's weight, for rows [begin, end): inner products of the
// output's gradient, packed as planes [rows][height][width], with the input at the entry's offset.
template <class A>
void convolve_weight(const Stream& stream, const A* grad_panels, const A* panels, int64_t planes_size,
                     int64_t height, int64_t width, int64_t step_h, int64_t step_w, A* values,
                     int64_t samples, int64_t begin, int64_t end);

// Rows [begin, end) of `to` [rows, cols] ← from [rows, cols], of any two layouts.
template <class T>
void copy_matrix(const Matrix<const T>& from, const Matrix<T>& to, int64_t cols, int64_t begin, int64_t end);

}  // namespace blokern

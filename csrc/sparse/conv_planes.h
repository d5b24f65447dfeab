// Convolutions of few samples, of stride 1: the pixels of a plane, not samples, lie in the lanes. An entry's
// input still lies at one offset from every output position, as long as positions run over the padded plane:
// those of its padding are computed too, and left out.
#pragma once

#include <cstdint>

#include "sparse/conv.h"

namespace blokern {

// The most samples for which this is faster than samples in the lanes.
constexpr int64_t kPlanesSamples = 8;

// Output rows [h, h + tiling.height) of the channels [begin, end) of one image; both images'
// planes are contiguous.
template <class T>
void convolve_planes(const Images<const T>& image, const Tiling& tiling, const Piece<T>& piece, const T* bias,
                     const Images<T>& y, int64_t h, int64_t begin, int64_t end);

}  // namespace blokern

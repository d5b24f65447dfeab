// The entries of a convolution's mask as its walks take them: where the weight has them, and at which offset
// in a tile their input lies. Of the convolution itself, or of its gradient by the input.
#pragma once

#include <cstdint>

#include "sparse/stream.h"

namespace blokern {

// A weight [rows, own, taps] in groups: own input channels to each of `groups` equal parts of the rows.
struct ConvEntries {
  int64_t groups, own, taps;
  const int64_t* place;  // [taps]: a tap's pixel in a plane of the tile, or -1 for one that is not taken
  int64_t plane;         // pixels of a plane
  int64_t block;         // columns a block
  bool transposed;       // rows are input channels, and columns output channels and taps
};

// What the entries are in the stream: a matrix [rows, cols].
int64_t stream_rows(const MaskWords& mask, const ConvEntries& entries);
int64_t stream_cols(const MaskWords& mask, const ConvEntries& entries);

// start[b * stream_rows + r + 1] ← how many entries of row r lie in block b. For the mask's rows [begin,
// end), or, of transposed ones, for its channels [begin, end).
void count_entries(const MaskWords& mask, const ConvEntries& entries, int32_t* start, int64_t begin,
                   int64_t end);
// Given start, summed up: each entry's place in the weight and its offset in pixels of a tile.
void fill_entries(const MaskWords& mask, const ConvEntries& entries, const int32_t* start, int32_t* source,
                  int32_t* offset, int64_t begin, int64_t end);

}  // namespace blokern

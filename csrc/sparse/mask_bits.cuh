// A mask's bits, as CUDA kernels that walk its weight in packs read them.
#pragma once

#include <cstdint>

#include "sparse/stream.h"
#include "support/cuda/pack.cuh"

namespace blokern {

// Of the entries from the i-th on of a row-major matrix with `cols` columns: bit k is that of entry i + k,
// where k is in play, of which one is at least.
template <int kSize>
BLOKERN_DEVICE unsigned mask_bits(const uint64_t* words, int64_t cols, int64_t i, Part<kSize> part) {
  const int lead = __ffs(static_cast<int>(part.bits)) - 1;
  const auto first = static_cast<uint64_t>(i + lead), width = static_cast<uint64_t>(cols);
  // A division of 64 bits costs many times one of 32.
  const uint64_t row = ((first | width) >> 32) == 0
                           ? static_cast<uint32_t>(first) / static_cast<uint32_t>(width)
                           : first / width;
  int64_t column = static_cast<int64_t>(first - row * width);
  const uint64_t* of_row = words + static_cast<int64_t>(row) * row_words(cols);
  unsigned bits = 0;
  if (column + kSize - lead <= cols) {  // of one row
    const int shift = static_cast<int>(column % 64);
    uint64_t word = of_row[column / 64] >> shift;
    if (shift + kSize - lead > 64) word |= of_row[column / 64 + 1] << (64 - shift);
    bits = static_cast<unsigned>(word << lead);
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (!part.has(k)) continue;
      if (column == cols) {
        column = 0;
        of_row += row_words(cols);
      }
      bits |= static_cast<unsigned>(of_row[column / 64] >> (column % 64) & 1) << k;
      ++column;
    }
  }
  return bits & part.bits;
}

}  // namespace blokern

// How a masked matrix [rows, cols] is walked: block by block of its columns, in a block row by row, in a row
// its kept entries from left to right. A block of the other factor's rows then stays in the first-level cache
// while all rows of the mask pass over it.
#pragma once

#include <cstdint>

#include "support/cuda/call.h"

namespace blokern {

struct Stream {
  int64_t rows, cols;
  int64_t block;  // columns a block, a multiple of 64
  const int32_t*
      start;  // [blocks() * rows + 1]: where the part of row r in block b begins, at [b * rows + r]
  const int32_t* column;  // [kept entries]

  constexpr int64_t blocks() const { return (cols + block - 1) / block; }
};

// A mask as bits: row r is words [r * row_words(cols), ...), column c bit c % 64 of word c / 64; bits beyond
// the last column are zero.
constexpr int64_t row_words(int64_t cols) { return (cols + 63) / 64; }

struct MaskWords {
  int64_t rows, cols;
  uint64_t* words;
};

// bool [rows, cols] to bits, for rows [begin, end), and back.
void pack_mask(const bool* mask, const MaskWords& to, int64_t begin, int64_t end);
void unpack_mask(const MaskWords& from, bool* mask, int64_t begin, int64_t end);

// `to` is the transpose of `from`, for to's words [begin, end) of each row: from's rows 64 · begin and on.
void transpose_mask(const MaskWords& from, const MaskWords& to, int64_t begin, int64_t end);

// start[b * rows + r + 1] ← how many entries of row r lie in block b, for rows [begin, end).
void count_stream(const MaskWords& mask, int64_t block, int32_t* start, int64_t begin, int64_t end);
// Given start, summed up: the columns of rows [begin, end).
void fill_stream(const MaskWords& mask, int64_t block, const int32_t* start, int32_t* column, int64_t begin,
                 int64_t end);

// CUDA kernels of the same, for all rows, queued on the call's stream.
void pack_mask(const bool* mask, const MaskWords& to, const CudaCall& call);
void unpack_mask(const MaskWords& from, bool* mask, const CudaCall& call);
void transpose_mask(const MaskWords& from, const MaskWords& to, const CudaCall& call);
void count_stream(const MaskWords& mask, int64_t block, int32_t* start, const CudaCall& call);
void fill_stream(const MaskWords& mask, int64_t block, const int32_t* start, int32_t* column,
                 const CudaCall& call);
// *count += how many bits of words [size] are set.
void count_words(const uint64_t* words, int64_t size, int64_t* count, const CudaCall& call);

// On the CPU: the largest of places [count], of which negative ones are the largest; 0 of none.
uint32_t largest_place(const int32_t* place, int64_t count);

}  // namespace blokern

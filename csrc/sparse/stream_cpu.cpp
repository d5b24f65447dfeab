#include "sparse/stream.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace blokern {
namespace {

// Eight bools, each 0 or 1, to eight bits, the first the lowest: the product moves byte i to bit 56 + i.
inline uint64_t pack_byte(const bool* from) {
  uint64_t bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return (bytes * 0x0102040810204080ull) >> 56;
}

// Back: of eight copies of the byte the i-th keeps bit i, which the sum carries to the top of its byte.
inline void unpack_byte(uint64_t bits, bool* to) {
  const uint64_t kept = (bits & 0xff) * 0x0101010101010101ull & 0x8040201008040201ull;
  const uint64_t bytes = (kept + 0x7f7f7f7f7f7f7f7full) >> 7 & 0x0101010101010101ull;
  std::memcpy(to, &bytes, sizeof(bytes));
}

// Hacker's Delight, 7-3: 64 × 64 bits in six rounds of swapped quarters.
void transpose_block(uint64_t (&block)[64]) {
  uint64_t low = 0x00000000ffffffffull;
  for (int width = 32; width != 0; width >>= 1, low ^= low << width) {
    for (int k = 0; k < 64; k = ((k | width) + 1) & ~width) {
      const uint64_t swapped = ((block[k] >> width) ^ block[k | width]) & low;
      block[k] ^= swapped << width;
      block[k | width] ^= swapped;
    }
  }
}

// body(row, block, words, count) for each row's part of each block of columns.
template <class Body>
void for_each_part(const MaskWords& mask, int64_t block, int64_t begin, int64_t end, Body&& body) {
  const int64_t words = row_words(mask.cols), block_words = block / 64;
  for (int64_t r = begin; r < end; ++r) {
    const uint64_t* const row = mask.words + r * words;
    for (int64_t b = 0, first = 0; first < words; ++b, first += block_words)
      body(r, b, row + first, std::min(block_words, words - first));
  }
}

}  // namespace

void pack_mask(const bool* mask, const MaskWords& to, int64_t begin, int64_t end) {
  const int64_t words = row_words(to.cols);
  for (int64_t r = begin; r < end; ++r) {
    const bool* const row = mask + r * to.cols;
    for (int64_t w = 0; w < words; ++w) {
      const int64_t first = 64 * w, count = std::min<int64_t>(64, to.cols - first);
      uint64_t word = 0;
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) word |= pack_byte(row + first + i) << i;
      for (; i < count; ++i) word |= static_cast<uint64_t>(row[first + i]) << i;
      to.words[r * words + w] = word;
    }
  }
}

void unpack_mask(const MaskWords& from, bool* mask, int64_t begin, int64_t end) {
  const int64_t words = row_words(from.cols);
  for (int64_t r = begin; r < end; ++r) {
    const uint64_t* const row = from.words + r * words;
    bool* const to = mask + r * from.cols;
    int64_t c = 0;
    for (; c + 8 <= from.cols; c += 8) unpack_byte(row[c / 64] >> (c % 64), to + c);
    for (; c < from.cols; ++c) to[c] = (row[c / 64] >> (c % 64)) & 1;
  }
}

void transpose_mask(const MaskWords& from, const MaskWords& to, int64_t begin, int64_t end) {
  const int64_t from_words = row_words(from.cols), to_words = row_words(to.cols);
  for (int64_t w = begin; w < end; ++w) {
    const int64_t rows = std::min<int64_t>(64, from.rows - 64 * w);
    for (int64_t v = 0; v < from_words; ++v) {
      uint64_t block[64] = {};
      for (int64_t i = 0; i < rows; ++i) block[i] = from.words[(64 * w + i) * from_words + v];
      transpose_block(block);
      const int64_t columns = std::min<int64_t>(64, to.rows - 64 * v);
      for (int64_t i = 0; i < columns; ++i) to.words[(64 * v + i) * to_words + w] = block[i];
    }
  }
}

void count_stream(const MaskWords& mask, int64_t block, int32_t* start, int64_t begin, int64_t end) {
  for_each_part(mask, block, begin, end, [&](int64_t r, int64_t b, const uint64_t* words, int64_t count) {
    int32_t kept = 0;
    for (int64_t i = 0; i < count; ++i) kept += std::popcount(words[i]);
    start[b * mask.rows + r + 1] = kept;
  });
}

void fill_stream(const MaskWords& mask, int64_t block, const int32_t* start, int32_t* column, int64_t begin,
                 int64_t end) {
  for_each_part(mask, block, begin, end, [&](int64_t r, int64_t b, const uint64_t* words, int64_t count) {
    int32_t* out = column + start[b * mask.rows + r];
    for (int64_t i = 0; i < count; ++i) {
      const int32_t first = static_cast<int32_t>(b * block + 64 * i);
      for (uint64_t word = words[i]; word != 0; word &= word - 1) *out++ = first + std::countr_zero(word);
    }
  });
}

uint32_t largest_place(const int32_t* place, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, static_cast<uint32_t>(place[i]));
  return most;
}

}  // namespace blokern

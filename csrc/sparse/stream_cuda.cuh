// Masks as bits on CUDA, and the streams of their entries.
// Threads: packing and unpacking, a thread 16 columns of a row, which are 16 bytes and half of a half word;
//   transposing, a warp 32 × 32 bits by ballots; counting, a thread two words; streams, a warp a row's part
//   in a block of columns, its lanes words. Shared memory: a count a warp. Integers alone: the CPU's results.
// Memory: each mask and stream is read or written once; words are 1/8 byte an entry.
#pragma once

#include <cstdint>

#include "sparse/stream.h"
#include "support/cuda/grid.cuh"
#include "support/cuda/pack.cuh"

namespace blokern {

constexpr int kPiece = 16;  // columns a thread
constexpr int kHalf = 32;

// body(piece, at, part): the piece's columns of a row begin at element `at`, and `part` of them are there.
template <class Body>
BLOKERN_DEVICE void each_piece(const MaskWords& mask, Body body) {
  const int64_t pieces = row_words(mask.cols) * (64 / kPiece);
  each_thread(mask.rows * pieces, [&](int64_t unit) {
    const int64_t row = unit / pieces, column = unit % pieces * kPiece, rest = mask.cols - column;
    unsigned bits = Part<kPiece>::kWhole;
    if (rest < kPiece) bits = rest <= 0 ? 0 : bits >> (kPiece - rest);
    body(unit, row * mask.cols + column, Part<kPiece>{bits});
  });
}

__global__ void __launch_bounds__(kTeamThreads) pack_pieces(const bool* mask, MaskWords to) {
  auto* const pieces = reinterpret_cast<uint16_t*>(to.words);
  each_piece(to, [&](int64_t piece, int64_t at, auto part) {
    const auto kept = load<bool>(mask + at, part);
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kPiece; ++k) bits |= static_cast<unsigned>(kept[k]) << k;
    pieces[piece] = static_cast<uint16_t>(bits);
  });
}

__global__ void __launch_bounds__(kTeamThreads) unpack_pieces(MaskWords from, bool* mask) {
  const auto* const pieces = reinterpret_cast<const uint16_t*>(from.words);
  each_piece(from, [&](int64_t piece, int64_t at, auto part) {
    const unsigned bits = pieces[piece];
    store(mask + at, each<bool>(part, [&](int k) { return (bits >> k & 1) != 0; }), part);
  });
}

// A unit: 32 rows of `from` in 32 columns. Also where those rows are beyond the last, to's rows end in whole
// words.
__global__ void __launch_bounds__(kTeamThreads) transpose_halves(MaskWords from, MaskWords to) {
  const auto* const in = reinterpret_cast<const uint32_t*>(from.words);
  auto* const out = reinterpret_cast<uint32_t*>(to.words);
  const int64_t in_halves = 2 * row_words(from.cols), out_halves = 2 * row_words(from.rows);
  each_warp(out_halves * in_halves, [&](int64_t unit) {
    const int64_t row = unit / in_halves * kHalf + lane_index(), half = unit % in_halves;
    const uint32_t bits = row < from.rows ? in[row * in_halves + half] : 0;
    uint32_t mine = 0;
#pragma unroll
    for (int column = 0; column < kHalf; ++column) {
      const uint32_t of_column = __ballot_sync(kFullWarp, static_cast<int>(bits >> column & 1));
      if (column == lane_index()) mine = of_column;
    }
    const int64_t column = half * kHalf + lane_index();
    if (column < from.cols) out[column * out_halves + unit / in_halves] = mine;
  });
}

__global__ void __launch_bounds__(kTeamThreads)
    count_bits(const uint64_t* words, int64_t size, unsigned long long* count) {
  int64_t mine = 0;
  const auto walk = grid_walk<2>(size, misalignment(words));
  walk.sweep([&](int64_t i, auto part) {
    const auto two = load<uint64_t>(words + i, part);
    mine += __popcll(two[0]) + __popcll(two[1]);
  });
  const int64_t total = block_prefix(mine).total;
  if (threadIdx.x == 0 && total != 0) atomicAdd(count, static_cast<unsigned long long>(total));
}

// body(row, block, words, count) for this warp's parts of rows.
template <class Body>
BLOKERN_DEVICE void each_part(const MaskWords& mask, int64_t block, Body body) {
  const int64_t words = row_words(mask.cols), block_words = block / 64;
  each_warp((mask.cols + block - 1) / block * mask.rows, [&](int64_t part) {
    const int64_t b = part / mask.rows, first = b * block_words, rest = words - first;
    body(part, b * block, mask.words + part % mask.rows * words + first,
         rest < block_words ? rest : block_words);
  });
}

__global__ void __launch_bounds__(kTeamThreads) count_parts(MaskWords mask, int64_t block, int32_t* start) {
  each_part(mask, block, [&](int64_t part, int64_t, const uint64_t* words, int64_t count) {
    int kept = 0;
    for (int64_t i = lane_index(); i < count; i += kWarpSize) kept += __popcll(words[i]);
    kept = warp_sum(kept);
    if (lane_index() == 0) start[part + 1] = kept;
  });
}

__global__ void __launch_bounds__(kTeamThreads)
    fill_parts(MaskWords mask, int64_t block, const int32_t* start, int32_t* column) {
  each_part(mask, block, [&](int64_t part, int64_t columns, const uint64_t* words, int64_t count) {
    int32_t* out = column + start[part];
    for (int64_t first = 0; first < count; first += kWarpSize) {
      const int64_t i = first + lane_index();
      uint64_t word = i < count ? words[i] : 0;
      const int kept = __popcll(word), through = warp_prefix(kept);
      int32_t* mine = out + through - kept;
      for (; word != 0; word &= word - 1)
        *mine++ = static_cast<int32_t>(columns + 64 * i + __popcll((word & (~word + 1)) - 1));
      out += __shfl_sync(kFullWarp, through, kWarpSize - 1);
    }
  });
}

}  // namespace blokern

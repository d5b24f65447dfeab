// packed_spmm on CUDA, and what packs a weight's entries and unpacks them.
// Threads: a warp a row and up to 128 samples. The warp loads 128 entries, a lane four neighbouring ones, on
//   16-byte boundaries; then groups of lanes take one entry each, whose samples the group's lanes share, four
//   each: an entry's samples are one access of a group, and few samples leave no lane idle.
// No shared memory. Numerics: a group adds its entries in order, groups in a fixed tree, in the accumulation
//   type: the same bits on every run.
// Memory: an entry is 8 bytes (12 of float64), read once a 128 samples; X comes from cache, 4 bytes an entry
//   and sample.
#pragma once

#include <cmath>

#include "sparse/products_cuda.h"
#include "support/cuda/grid.cuh"
#include "support/cuda/pack.cuh"
#include "support/math.h"

namespace blokern {

constexpr int kEntriesALane = 4;

// kLane: samples a lane; group: lanes an entry, a power of 2. The bound of 64 registers keeps ptxas from
// spilling for a fifth block a multiprocessor.
template <class T, int kLane>
__global__ void __launch_bounds__(kTeamThreads, 4) multiply_packed(PackedSpmm<T> p, int group) {
  using A = Accum<T>;
  const Stream& stream = p.stream;
  const int64_t tile = int64_t{group} * kLane, tiles = (p.samples - 1) / tile + 1;
  const int at_once = kWarpSize / group;
  // A division of 64 bits is a call. Each unit writes 512 bytes, so that there are fewer than 2³².
  const auto width = static_cast<uint32_t>(tiles);
  each_warp(stream.rows * tiles, [&](int64_t unit) {
    const uint32_t index = static_cast<uint32_t>(unit), at = index / width;
    const int64_t row = at, s = (index - at * width) * tile + lane_index() % group * kLane;
    const Part<kLane> samples = part_at<kLane>(s, p.samples);
    A sum[kLane] = {};
    for (int64_t b = 0; b < stream.blocks(); ++b) {
      const int32_t* const start = stream.start + b * stream.rows + row;
      const int64_t begin = start[0], end = start[1];
      // From the boundary at or before the first entry: lanes go on together, for they exchange entries.
      for (int64_t first = begin / kEntriesALane * kEntriesALane; first < end;
           first += kWarpSize * kEntriesALane) {
        const int64_t own = first + lane_index() * kEntriesALane;
        const Part<kEntriesALane> there{part_at<kEntriesALane>(own, end).bits &
                                        ~part_at<kEntriesALane>(own, begin).bits};
        const auto value = load<A>(p.value + own, there);
        auto column = load<int32_t>(stream.column + own, there);
#pragma unroll
        for (int k = 0; k < kEntriesALane; ++k) {
          if (!there.has(k)) column[k] = -1;
        }
        for (int round = 0; round < group; ++round) {
          const int source = round * at_once + lane_index() / group;
#pragma unroll
          for (int k = 0; k < kEntriesALane; ++k) {
            const int64_t c = __shfl_sync(kFullWarp, column[k], source);
            const A weight = __shfl_sync(kFullWarp, value[k], source);
            if (c < 0) continue;
            const auto x = load<A>(p.x + c * p.samples + s, samples);
#pragma unroll
            for (int j = 0; j < kLane; ++j) sum[j] = std::fma(weight, x[j], sum[j]);
          }
        }
      }
    }
    for (int lanes = group; lanes < kWarpSize; lanes *= 2) {
#pragma unroll
      for (int j = 0; j < kLane; ++j) sum[j] += __shfl_xor_sync(kFullWarp, sum[j], lanes);
    }
    if (lane_index() >= group) return;
    const A bias = p.bias == nullptr ? A(0) : static_cast<A>(p.bias[row]);
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      if (samples.has(j)) p.y[row * p.row_stride + (s + j) * p.sample_stride] = static_cast<T>(sum[j] + bias);
    }
  });
}

// body(row, entry, column) for all entries, a warp a row in a block of columns.
template <class Body>
BLOKERN_DEVICE void each_entry(const Stream& stream, Body body) {
  each_warp(stream.blocks() * stream.rows, [&](int64_t part) {
    const int64_t row = static_cast<uint32_t>(part) % static_cast<uint32_t>(stream.rows);
    const int64_t end = stream.start[part + 1];
    for (int64_t i = stream.start[part] + lane_index(); i < end; i += kWarpSize)
      body(row, i, static_cast<int64_t>(stream.column[i]));
  });
}

template <class T>
__global__ void __launch_bounds__(kTeamThreads, 6)
    gather_entries(Stream stream, const T* weight, int64_t row_stride, int64_t col_stride, Accum<T>* value) {
  each_entry(stream, [=](int64_t row, int64_t i, int64_t column) {
    value[i] = static_cast<Accum<T>>(weight[row * row_stride + column * col_stride]);
  });
}

template <class T>
__global__ void __launch_bounds__(kTeamThreads, 6)
    scatter_entries(Stream stream, const Accum<T>* value, T* weight) {
  each_entry(stream, [=](int64_t row, int64_t i, int64_t column) {
    weight[row * stream.cols + column] = static_cast<T>(value[i]);
  });
}

}  // namespace blokern

// The masked products by their entries on CUDA.
// Threads: spmm, a warp a row and 128 samples (64, 32 where there are fewer), a lane neighbouring samples:
//   the warp loads 32 entries, values gathered from the dense weight, then all lanes take one after the
//   other. sddmm, eight lanes an entry, which share its samples.
// Shared memory: spmm, a warp's 32 entries.
// Numerics: sums in the stream's order (sddmm: eight sums over samples, added in a tree), in the accumulation
//   type: the same bits on every run.
// Memory: an entry is 8 bytes and a sector of 32 bytes of the weight; X and B, rows of samples an entry, come
//   from cache.
#pragma once

#include <cmath>

#include "sparse/products_cuda.h"
#include "support/cuda/grid.cuh"
#include "support/cuda/pack.cuh"
#include "support/math.h"

namespace blokern {

template <class A>
struct Entry {
  A value;
  int32_t column;
};

// kLane: samples a lane.
template <class T, int kLane>
__global__ void __launch_bounds__(kTeamThreads) multiply_stream(StreamSpmm<T> p) {
  using A = Accum<T>;
  BLOKERN_SHARED(Entry<A>, staged, kTeamThreads);
  Entry<A>* const entries = staged + threadIdx.x / kWarpSize * kWarpSize;
  const Stream& stream = p.stream;
  const int64_t tiles = (p.samples - 1) / (kWarpSize * kLane) + 1;
  each_warp(stream.rows * tiles, [&](int64_t unit) {
    const int64_t row = unit / tiles, s = (unit % tiles * kWarpSize + lane_index()) * kLane;
    const Part<kLane> part = part_at<kLane>(s, p.samples);
    const T* const weight = p.weight + row * p.row_stride;
    Pack<A, kLane> sum{};
    for (int64_t b = 0; b < stream.blocks(); ++b) {
      const int32_t* const start = stream.start + b * stream.rows + row;
      for (int32_t first = start[0]; first < start[1]; first += kWarpSize) {
        const int32_t count = start[1] - first < kWarpSize ? start[1] - first : kWarpSize;
        __syncwarp();  // the last entries have been taken
        if (lane_index() < count) {
          const int32_t column = stream.column[first + lane_index()];
          entries[lane_index()] = {static_cast<A>(weight[column * p.col_stride]), column};
        }
        __syncwarp();
#pragma unroll 4
        for (int i = 0; i < count; ++i) {
          const Entry<A> entry = entries[i];
          const auto x = load<A>(p.x + entry.column * p.samples + s, part);
#pragma unroll
          for (int k = 0; k < kLane; ++k) sum[k] = std::fma(entry.value, x[k], sum[k]);
        }
      }
    }
    const A bias = p.bias == nullptr ? A(0) : static_cast<A>(p.bias[row]);
    store(p.y + row * p.samples + s, each<A>(part, [&](int k) { return sum[k] + bias; }), part);
  });
}

constexpr int kEntryLanes = 8, kEntries = kWarpSize / kEntryLanes;

// A row's entries, four at a time, are shared out among `splits` warps.
template <class T>
__global__ void __launch_bounds__(kTeamThreads) inner_products(StreamSddmm<T> p, int64_t splits) {
  using A = Accum<T>;
  constexpr int pack = kPackSize<T>;
  const Stream& stream = p.stream;
  each_warp(stream.rows * splits, [&](int64_t unit) {
    const int64_t row = unit / splits, split = unit % splits;
    const int lane = lane_index() % kEntryLanes;
    for (int64_t b = 0; b < stream.blocks(); ++b) {
      const int32_t* const start = stream.start + b * stream.rows + row;
      for (int64_t first = start[0] + split * kEntries; first < start[1]; first += splits * kEntries) {
        const int64_t entry = first + lane_index() / kEntryLanes;
        const bool is_there = entry < start[1];
        const int64_t column = is_there ? stream.column[entry] : 0;
        A sum = 0;
        for (int64_t s = int64_t{lane} * pack; is_there && s < p.samples; s += kEntryLanes * pack) {
          const Part<pack> part = part_at<pack>(s, p.samples);
          const auto a = load<A>(p.a + row * p.samples + s, part),
                     other = load<A>(p.b + column * p.samples + s, part);
#pragma unroll
          for (int k = 0; k < pack; ++k) sum = std::fma(a[k], other[k], sum);
        }
#pragma unroll
        for (int lanes = kEntryLanes / 2; lanes > 0; lanes /= 2)
          sum += __shfl_xor_sync(kFullWarp, sum, lanes);
        if (is_there && lane == 0) p.product[row * stream.cols + column] = static_cast<T>(sum);
      }
    }
  });
}

}  // namespace blokern

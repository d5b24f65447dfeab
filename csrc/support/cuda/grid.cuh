// Work in units that know nothing of each other, a thread or a warp each, and prefix sums over a block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "support/cuda/launch.cuh"
#include "support/cuda/pack.cuh"
#include "support/cuda/team.cuh"

namespace blokern {

// body(unit) for this thread's share of `count` units.
template <class Body>
BLOKERN_DEVICE void each_thread(int64_t count, Body body) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTeamThreads;
#pragma unroll 1
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kTeamThreads + threadIdx.x; i < count; i += step)
    body(i);
}

// The same for a warp: all its lanes have the same units.
template <class Body>
BLOKERN_DEVICE void each_warp(int64_t count, Body body) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
#pragma unroll 1
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; i < count; i += step)
    body(i);
}

// The packs of a row of `size` elements, shared out among all threads of the grid.
template <int kSize>
BLOKERN_DEVICE Walk<kSize> grid_walk(int64_t size, int shift) {
  return {size, static_cast<int64_t>(blockIdx.x) * kTeamThreads + threadIdx.x,
          static_cast<int64_t>(gridDim.x) * kTeamThreads, shift};
}

// Launches kernel(arguments...) for `count` units of so many threads each.
template <class... Parameters, class... Arguments>
void launch_each(void (*kernel)(Parameters...), int64_t count, int threads_a_unit, const CudaCall& call,
                 const Arguments&... arguments) {
  if (count == 0) return;
  const int64_t a_block = kTeamThreads / threads_a_unit;
  const int64_t blocks = std::min<int64_t>((count + a_block - 1) / a_block, 1 << 20);
  launch(kernel, blocks, kTeamThreads, false, call, arguments...);
}

// Which blocks of a launch work on which part of a list: on the i-th, those from begin[i] on. A kernel
// parameter, so that lists need no copy to the device; parameters have 4 KB.
template <int kMost>
struct BlockRanges {
  int64_t begin[kMost + 1];
  int count;

  int64_t blocks() const { return begin[count]; }
  void append(int64_t blocks) {
    begin[count + 1] = begin[count] + blocks;
    ++count;
  }
  BLOKERN_DEVICE int owner(int64_t block) const {
    int i = 0;
    while (i + 1 < count && begin[i + 1] <= block) ++i;
    return i;
  }
};

BLOKERN_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }

// The sum of what the lanes up to this one bring.
template <class N>
BLOKERN_DEVICE N warp_prefix(N mine) {
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    const N other = __shfl_up_sync(kFullWarp, mine, lanes);
    if (lane_index() >= lanes) mine += other;
  }
  return mine;
}

template <class N>
BLOKERN_DEVICE N warp_sum(N mine) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) mine += __shfl_xor_sync(kFullWarp, mine, lanes);
  return mine;
}

// The sum of what the block's threads before this one bring, and of what all do.
struct Prefix {
  int64_t before, total;
};

BLOKERN_DEVICE Prefix block_prefix(int64_t mine) {
  BLOKERN_SHARED(int64_t, of_warp, kWarps);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t through = warp_prefix(mine);
  if (lane_index() == kWarpSize - 1) of_warp[warp] = through;
  __syncthreads();
  Prefix sum{through - mine, 0};
  for (int other = 0; other < kWarps; ++other) {
    if (other < warp) sum.before += of_warp[other];
    sum.total += of_warp[other];
  }
  __syncthreads();  // of_warp is free again
  return sum;
}

}  // namespace blokern

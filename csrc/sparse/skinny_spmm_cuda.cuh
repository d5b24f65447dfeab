// skinny_spmm on CUDA.
// Threads: a block some rows, all of their columns; a thread a pack of 16 bytes of each row, whose bits mask
//   it, and the same columns of every sample, which serve all of the rows. Shared memory: the warps' sums.
// Numerics: each thread adds in its columns' order, threads and warps in fixed trees, in the accumulation
//   type: the same bits on every run.
// Memory: the weight once, but for packs without an entry; samples come from cache.
#pragma once

#include <cmath>

#include "sparse/products_cuda.h"
#include "support/cuda/grid.cuh"
#include "support/cuda/pack.cuh"
#include "support/math.h"

namespace blokern {

template <class T, int kRows, int kSamples>
__global__ void __launch_bounds__(kTeamThreads) multiply_few(SkinnySpmm<T> p) {
  using A = Accum<T>;
  constexpr int pack = kPackSize<T>, sums = kRows * kSamples;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows, words = row_words(p.mask.cols);
  A sum[sums] = {};
#pragma unroll 1
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * pack; c < p.mask.cols;
       c += static_cast<int64_t>(blockDim.x) * pack) {
    const int64_t rest = p.mask.cols - c;
    const Part<pack> part{Part<pack>::kWhole >> (rest < pack ? pack - rest : 0)};
    Pack<A, pack> weight[kRows];
    unsigned any = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r;
      // A pack lies in one word, whose bits beyond the last column are zero.
      unsigned kept = 0;
      if (row < p.mask.rows) kept = static_cast<unsigned>(p.mask.words[row * words + c / 64] >> (c % 64));
      kept &= Part<pack>::kWhole;
      any |= kept;
      weight[r] = Pack<A, pack>{};
      if (kept == 0) continue;
      const auto all = load<A>(p.weight + row * p.weight_stride + c, part);
#pragma unroll
      for (int k = 0; k < pack; ++k) weight[r][k] = where((kept >> k & 1) != 0, all[k], A(0));
    }
    if (any == 0) continue;
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      const int64_t sample = s < p.samples ? s : p.samples - 1;  // the last again: not written
      const auto x = load<A>(p.x + sample * p.x_stride + c, part);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < pack; ++k)
          sum[r * kSamples + s] = std::fma(weight[r][k], x[k], sum[r * kSamples + s]);
      }
    }
  }
  BLOKERN_SHARED(A, of_warp, kWarps * sums);
#pragma unroll
  for (int i = 0; i < sums; ++i) {
    const A total = warp_sum(sum[i]);
    if (lane_index() == 0) of_warp[threadIdx.x / kWarpSize * sums + i] = total;
  }
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  const int64_t row = first + i / kSamples, sample = i % kSamples;
  if (i >= sums || row >= p.mask.rows || sample >= p.samples) return;
  A total = of_warp[i];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp)
    total += of_warp[warp * sums + i];
  if (p.bias != nullptr) total += static_cast<A>(p.bias[row]);
  p.y[row * p.row_stride + sample * p.sample_stride] = static_cast<T>(total);
}

}  // namespace blokern

// What masks torch's dense products on CUDA: the weight before, the gradient behind.
// Threads: a thread a pack of 16 bytes, on the boundaries of what is written. No shared memory, no
// arithmetic. Memory: apply_mask reads a weight's packs but those with no entry, and writes all; clear_masked
// writes the
//   masked entries alone. Both read the mask's bits.
#pragma once

#include "sparse/mask_bits.cuh"
#include "sparse/products_cuda.h"
#include "support/cuda/grid.cuh"

namespace blokern {

template <class T>
__global__ void __launch_bounds__(kTeamThreads) masked_packs(MaskWords mask, const T* weight, T* to) {
  grid_walk<kPackSize<T>>(mask.rows * mask.cols, misalignment(to)).sweep([&](int64_t i, auto part) {
    const unsigned kept = mask_bits(mask.words, mask.cols, i, part);
    Pack<T, part.size> pack = each<T>(part, [](int) { return T(0); });
    if (kept != 0) {
      const auto all = load<T>(weight + i, part);
#pragma unroll
      for (int k = 0; k < part.size; ++k) {
        if ((kept >> k & 1) != 0) pack[k] = all[k];
      }
    }
    store(to + i, pack, part);
  });
}

template <class T>
__global__ void __launch_bounds__(kTeamThreads) cleared_packs(MaskWords mask, T* product) {
  grid_walk<kPackSize<T>>(mask.rows * mask.cols, misalignment(product)).sweep([&](int64_t i, auto part) {
    const Part<part.size> masked{part.bits & ~mask_bits(mask.words, mask.cols, i, part)};
    store(product + i, each<T>(part, [](int) { return T(0); }), masked);
  });
}

}  // namespace blokern

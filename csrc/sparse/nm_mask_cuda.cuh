// nm_mask on CUDA: an entry is kept if fewer than n of its group come before it.
// Threads: where groups are 2, 4 or 8 neighbours, a thread 16 entries, whole groups in registers; else a
//   thread an entry, which reads its group from cache, neighbouring threads neighbouring groups where they
//   interleave. No shared memory. Integers alone: the CPU's mask.
// Memory: scores are read once, a byte an element written.
#pragma once

#include <type_traits>

#include "sparse/nm_mask.h"
#include "support/cuda/grid.cuh"
#include "support/cuda/pack.cuh"

namespace blokern {

template <class T>
using ScoreKey = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;

template <class T, int M>
__global__ void __launch_bounds__(kTeamThreads) nm_mask_neighbours(NmMask<T> p, int* ok) {
  using K = ScoreKey<T>;
  constexpr int size = kPackSize<T, bool>;
  const int64_t entries = p.groups * M;
  each_thread((entries + size - 1) / size, [&](int64_t unit) {
    const int64_t i = unit * size, rest = entries - i;
    const Part<size> part{Part<size>::kWhole >> (rest < size ? size - rest : 0)};
    const auto score = load<T>(p.scores + i, part);
    Pack<bool, size> kept;
    bool any_nan = false;
#pragma unroll
    for (int first = 0; first < size; first += M) {
      K key[M];
#pragma unroll
      for (int k = 0; k < M; ++k) {
        key[k] = order_key<K>(score[first + k]);
        any_nan |= key[k] == kNanKey<K>;
      }
#pragma unroll
      for (int k = 0; k < M; ++k) {
        int before = 0;
#pragma unroll
        for (int j = 0; j < M; ++j) before += j < k ? key[j] >= key[k] : key[j] > key[k];
        kept[first + k] = before < p.n;
      }
    }
    if (any_nan) *ok = 0;
    store(p.mask + i, kept, part);
  });
}

template <class T>
__global__ void __launch_bounds__(kTeamThreads) nm_mask_any(NmMask<T> p, int* ok) {
  using K = ScoreKey<T>;
  each_thread(p.groups * p.m, [&](int64_t i) {
    const int64_t row = i / (p.m * p.inner), k = i / p.inner % p.m, column = i % p.inner;
    const T* const group = p.scores + row * p.m * p.inner + column;
    const K key = order_key<K>(group[k * p.inner]);
    if (key == kNanKey<K>) *ok = 0;
    int64_t before = 0;
    for (int64_t j = 0; j < p.m; ++j) {
      const K other = order_key<K>(group[j * p.inner]);
      before += j < k ? other >= key : other > key;
    }
    p.mask[i] = before < p.n;
  });
}

}  // namespace blokern

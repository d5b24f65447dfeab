// topk_mask on CUDA, a few launches for a whole list of tensors, and nothing comes back to the host.
// Threads: a block a chunk of one tensor; a thread 16 bytes of scores at once, where it writes the mask 16
//   elements. A block more a selection finds the threshold's next digit from the counts.
// Shared memory: the digits' counts, 32 KiB; of 32-bit keys four copies, for scores of one magnitude have few
//   first digits, and lanes would wait for each other.
// Numerics: integers alone, so that the order of atomic additions does not show: the CPU's masks.
// Memory: scores are read once a pass, three or five (64-bit keys), and once for the mask, which is written.
#pragma once

#include <cstdint>

#include "sparse/topk_mask.h"
#include "support/cuda/grid.cuh"
#include "support/cuda/pack.cuh"
#include "support/dtypes.h"

namespace blokern {

// What a launch takes of the list.
constexpr int kListed = 64;

struct LayerList {
  ScoreLayer layers[kListed];
  BlockRanges<kListed> chunks;
  int64_t selection[kListed];  // its selection's first chunk, in the whole list
  int64_t first;               // the launch's first chunk in the whole list
  int64_t chunk;               // scores a chunk, a multiple of what a block reads at once
};

struct WantedList {
  int64_t of[kListed];
};

// A selection between passes: the threshold's bits that are known, and how many of the keys that have them
// are to be kept.
template <class K>
struct Chosen {
  K known;
  int64_t left;
};

using DigitCount = unsigned long long;

// body(scores, mask, size, layer) of this block's chunk, in the layer's type.
template <class K, class Body>
BLOKERN_DEVICE void on_chunk(const LayerList& list, Body body) {
  const int i = list.chunks.owner(blockIdx.x);
  const ScoreLayer& layer = list.layers[i];
  const int64_t begin = (blockIdx.x - list.chunks.begin[i]) * list.chunk;
  const int64_t size = layer.size - begin < list.chunk ? layer.size - begin : list.chunk;
  bool* const mask = layer.mask + begin;
  const auto as = [&](auto* scores) { body(scores + begin, mask, size, i); };
  switch (layer.type) {
    case ScoreType::float64:
      if constexpr (sizeof(K) == 8) as(static_cast<const double*>(layer.scores));
      break;
    case ScoreType::float32:
      as(static_cast<const float*>(layer.scores));
      break;
    case ScoreType::bfloat16:
      as(static_cast<const c10::BFloat16*>(layer.scores));
      break;
    case ScoreType::float16:
      as(static_cast<const c10::Half*>(layer.scores));
      break;
  }
}

template <class T>
BLOKERN_DEVICE Walk<kPackSize<T>> walk_of(const T* scores, int64_t size) {
  return {size, threadIdx.x, kTeamThreads, misalignment(scores)};
}

// counts[selection][digit] += the keys that equal `chosen` in at's mask. at: the pass's, known bits aside.
template <class K>
__global__ void __launch_bounds__(kTeamThreads)
    count_digits(LayerList list, Digit<K> at, const Chosen<K>* chosen, DigitCount* counts) {
  constexpr int values = Digit<K>::kValues, copies = 8192 / values;
  BLOKERN_SHARED(unsigned, seen, values* copies);
  for (int i = threadIdx.x; i < values * copies; i += kTeamThreads) seen[i] = 0;
  __syncthreads();
  const int32_t selection = list.layers[list.chunks.owner(blockIdx.x)].selection;
  const Digit<K> digit{at.shift, at.mask, chosen[selection].known};
  const int copy = lane_index() % copies;
  on_chunk<K>(list, [&]<class T>(const T* scores, bool*, int64_t size, int) {
    walk_of(scores, size).sweep([&](int64_t i, auto part) {
      const auto score = load<T>(scores + i, part);
#pragma unroll
      for (int k = 0; k < part.size; ++k) {
        const K key = order_key<K>(score[k]);
        if (part.has(k) && digit.admits(key)) atomicAdd(&seen[digit.of(key) * copies + copy], 1u);
      }
    });
  });
  __syncthreads();
  DigitCount* const of_selection = counts + selection * static_cast<int64_t>(values);
  for (int value = threadIdx.x; value < values; value += kTeamThreads) {
    unsigned n = 0;
    for (int i = 0; i < copies; ++i) n += seen[value * copies + i];
    if (n != 0) atomicAdd(&of_selection[value], static_cast<DigitCount>(n));
  }
}

// One block a selection, from the first-th on: the digit where the count from above reaches what is left to
// keep is the threshold's. Leaves the counts zero for the next pass.
template <class K>
__global__ void __launch_bounds__(kTeamThreads) choose_digit(WantedList wanted, int64_t first, Digit<K> at,
                                                             Chosen<K>* chosen, DigitCount* counts, int* ok) {
  constexpr int values = Digit<K>::kValues, a_thread = values / kTeamThreads;
  Chosen<K>& selection = chosen[first + blockIdx.x];
  DigitCount* const count = counts + (first + blockIdx.x) * values;
  const int64_t left = at.is_first() ? wanted.of[blockIdx.x] : selection.left;
  const int top = values - 1 - static_cast<int>(threadIdx.x) * a_thread;  // this thread's, and those below
  int64_t mine = 0;
  for (int j = 0; j < a_thread; ++j) mine += static_cast<int64_t>(count[top - j]);
  const int64_t above = block_prefix(mine).before;
  if (at.is_first() && threadIdx.x == 0 && count[top] != 0) *ok = 0;
  if (left == 0 ? threadIdx.x == 0 : above < left && left <= above + mine) {
    int64_t rest = left - above;
    int value = top;
    for (; rest > static_cast<int64_t>(count[value]); --value) rest -= static_cast<int64_t>(count[value]);
    Digit<K> digit{at.shift, at.mask, selection.known};
    digit.fix(value);
    selection = {digit.known, rest};
  }
  for (int j = 0; j < a_thread; ++j) count[top - j] = 0;
}

// mask ← which keys are above the threshold; equal[chunk] ← how many equal it.
template <class K>
__global__ void __launch_bounds__(kTeamThreads)
    mask_larger(LayerList list, const Chosen<K>* chosen, int64_t* equal) {
  int64_t ties = 0;
  on_chunk<K>(list, [&]<class T>(const T* scores, bool* mask, int64_t size, int layer) {
    const K threshold = chosen[list.layers[layer].selection].known;
    const Walk<kPackSize<T, bool>> walk{size, threadIdx.x, kTeamThreads, misalignment(mask)};
    walk.sweep([&](int64_t i, auto part) {
      const auto score = load<T>(scores + i, part);
      Pack<bool, part.size> larger;
#pragma unroll
      for (int k = 0; k < part.size; ++k) {
        const K key = order_key<K>(score[k]);
        larger[k] = key > threshold;
        ties += part.has(k) && key == threshold;
      }
      store(mask + i, larger, part);
    });
  });
  const int64_t total = block_prefix(ties).total;
  if (threadIdx.x == 0) equal[list.first + blockIdx.x] = total;
}

// Adds to the masks the first of a selection's keys that equal its threshold, as many as are left to keep.
// Mostly there is one such key, and all other blocks end at once.
template <class K>
__global__ void __launch_bounds__(kTeamThreads)
    mask_ties(LayerList list, const Chosen<K>* chosen, const int64_t* equal) {
  const int64_t chunk = list.first + blockIdx.x;
  if (equal[chunk] == 0) return;
  on_chunk<K>(list, [&]<class T>(const T* scores, bool* mask, int64_t size, int layer) {
    const Chosen<K> selection = chosen[list.layers[layer].selection];
    int64_t mine = 0;
    for (int64_t c = list.selection[layer] + threadIdx.x; c < chunk; c += kTeamThreads) mine += equal[c];
    int64_t left = selection.left - block_prefix(mine).total;
    constexpr int pack = kPackSize<T>;
    for (int64_t first = 0; left > 0 && first < size; first += kTeamThreads * pack) {
      const int64_t i = first + static_cast<int64_t>(threadIdx.x) * pack;
      unsigned ties = 0;
      for (int k = 0; k < pack && i + k < size; ++k)
        ties |= static_cast<unsigned>(order_key<K>(scores[i + k]) == selection.known) << k;
      const Prefix rank = block_prefix(__popc(ties));
      int64_t room = left - rank.before;
      for (; ties != 0 && room > 0; ties &= ties - 1, --room)
        mask[i + __ffs(static_cast<int>(ties)) - 1] = true;
      left -= rank.total;
    }
  });
}

}  // namespace blokern

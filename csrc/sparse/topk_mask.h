// topk_mask: the largest of many scores, equal ones in the order of their indices, by radix selection. A pass
// counts the keys that may be the threshold by their next digit, from the highest on; the digit where the
// count from above reaches the number to keep is the threshold's. Counts add up over any parts of the scores.
#pragma once

#include <cstdint>
#include <span>

#include "sparse/order.h"
#include "support/cuda/call.h"

namespace blokern {

// What a pass counts: of the keys that equal `known` in the bits of `mask`, the digit that begins at `shift`.
template <class K>
struct Digit {
  // The first digit ends below the exponent, so that its last value is that of NaN alone.
  static constexpr int kBits = sizeof(K) == 4 ? 11 : 13;
  static constexpr int kPasses = sizeof(K) == 4 ? 3 : 5;
  static constexpr int64_t kValues = int64_t(1) << kBits;

  int shift = 8 * sizeof(K) - kBits;
  K mask = 0, known = 0;

  BLOKERN_INLINE bool is_first() const { return mask == 0; }
  BLOKERN_INLINE bool admits(K key) const { return (key & mask) == known; }
  BLOKERN_INLINE int64_t of(K key) const { return static_cast<int64_t>(key >> shift) & (kValues - 1); }

  // The threshold has this value here: on to the next digit. The last one begins with bits that are known.
  BLOKERN_INLINE void fix(int64_t value) {
    known |= static_cast<K>(value) << shift;
    mask = ~K(0) << shift;
    shift = shift > kBits ? shift - kBits : 0;
  }
};

// counts[d] += how many of the scores' keys the digit admits and finds to be d.
template <class K, class T>
void count_digits(const T* scores, int64_t size, const Digit<K>& digit, int64_t* counts);

// mask ← which keys are above the threshold, or among the first `ties` that equal it; returns what is
// left of `ties`.
template <class K, class T>
int64_t mask_largest(const T* scores, int64_t size, K threshold, int64_t ties, bool* mask);

enum class ScoreType : int32_t { float64, float32, bfloat16, float16 };

// One tensor of a list, row-major.
struct ScoreLayer {
  const void* scores;
  bool* mask;
  int64_t size;
  int32_t selection;  // the one that it takes part in: layers of one follow each other
  ScoreType type;
};

// CUDA: the masks of a whole list, selection s keeping wanted[s] entries, queued on the call's stream; *ok ←
// 0 where a score is NaN, and the masks then mean nothing. K's keys hold every layer's scores.
template <class K>
void topk_mask(std::span<const ScoreLayer> layers, std::span<const int64_t> wanted, int* ok,
               const CudaCall& call);

}  // namespace blokern
